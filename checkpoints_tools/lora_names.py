"""How adapter files name their tensors: prefixes, factors, differences (tables), and which module a name means.

| written by | a layer's factors | scale | more |
|---|---|---|---|
| PEFT | `base_model.model.<module>.lora_A[.default].weight`, `lora_B` | `adapter_config.json` | whole parameters |
| kohya, musubi-tuner | `lora_unet_<module, _ for .>.lora_down.weight`, `lora_up` | `<same>.alpha` | |
| diffusers | `transformer.<diffusers' module>.lora_A.weight`, `lora_B`; older `.lora.down.weight` | 1 | |
| ComfyUI, lightx2v | `diffusion_model.<module>.lora_down.weight` or `lora_A` | `.alpha` or 1 | `.diff`, `_b`, `_m` |

Sources: peft's save format (docs, "Checkpoint format"), LightX2V's docs (deploy_guides/lora_deploy, "Supported LoRA
Formats"), liveavatar.md 1.4, omniavatar.md 1.3.
"""

from collections.abc import Iterable, Mapping

from .keymaps import KeyMap

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
)
PEFT_FACTORS = {
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
}
FACTORS = PEFT_FACTORS | {
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
}
DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
ALPHA = ".alpha"
OTHER_METHODS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid.weight": "LoCon with a middle factor",
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
    ".lora_embedding_A": "LoRA of an embedding",
}


def without_prefix(key: str) -> str:
    """The key below the one prefix of `PREFIXES` that it may have."""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def split_ending(key: str, endings: Mapping[str, str]) -> tuple[str, str] | None:
    """(what stands before, meaning) of the first ending that the key has; None when it has none."""
    for ending, meaning in endings.items():
        if key.endswith(ending):
            return key[: -len(ending)], meaning
    return None


class Names:
    """Which parameter of a model a name in an adapter file means: our own, diffusers', or either with `_` for `.`.

    `parameters`: our names; `keymap`: a table from ours to another library's, where adapters may use those.
    """

    def __init__(self, parameters: Iterable[str], keymap: KeyMap | None = None):
        self._ours: dict[str, str] = {}
        known = list(parameters)
        for name in known:
            self._ours.setdefault(name, name)
        for name in known:
            for other in keymap.rename(name) if keymap else ():
                self._ours.setdefault(other, name)
        for name, ours in list(self._ours.items()):
            module, _, leaf = name.rpartition(".")
            self._ours.setdefault(f"{module.replace('.', '_')}.{leaf}", ours)

    def find(self, name: str) -> str | None:
        """Our name of a parameter; None for one that the model has not."""
        return self._ours.get(name)
