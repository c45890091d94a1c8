"""LoRA files as the tools write them, merged, against PEFT's own merge."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kinora.checkpoints_tools.keymaps_dit import WAN_DIFFUSERS
from kinora.checkpoints_tools.lora import LORA_TARGETS, Lora, Scaling, merge_lora, read_lora
from kinora.checkpoints_tools.lora_names import FACTORS, Names, split_ending, without_prefix
from kinora.checkpoints_tools.safetensors_header import UnreadableFile
from kinora.checkpoints_tools.sources import open_weights
from kinora.graphs.models.wan import WanModel
from kinora.graphs.models.wan_configs import WanConfig
from safetensors.torch import save_file
from torch import Tensor

peft = pytest.importorskip("peft")

CONFIG = WanConfig(dim=24, ffn_dim=20, num_heads=2, num_layers=2, text_dim=16, freq_dim=8)
TARGETS = "|".join((r".*\.(q|k|v|o)", r".*\.ffn\.(0|2)"))
State = dict[str, Tensor]


def base() -> WanModel:
    torch.manual_seed(0)
    return WanModel(CONFIG)


def adapted(folder: Path, **options: object) -> tuple[State, State, Scaling]:
    """PEFT's file of an adapter of `base()` with random factors; PEFT's own merge; the scaling beside the file."""
    config = peft.LoraConfig(target_modules=TARGETS, **({"r": 4, "lora_alpha": 6} | options))
    model = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    with open_weights(folder / "adapter_model.safetensors") as weights:
        file = {name: weights.read(name) for name in weights}
    scaling = Scaling.beside(folder / "adapter_model.safetensors")
    return file, model.merge_and_unload().state_dict(), scaling


def merged(lora: Lora) -> State:
    state = base().state_dict()
    lora.check({name: value.shape for name, value in state.items()})
    return {name: lora.apply(name, value) for name, value in state.items()}


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
    changed = [name for name, value in base().state_dict().items() if not torch.equal(found[name], value)]
    assert len(changed) == 20  # 10 layers a block


# -- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {r"ffn\.0": 2}, "alpha_pattern": {r"blocks.1.self_attn.q": 12, r"ffn\.2": 1}},
    ],
)
def test_pefts_files_merge_as_peft_merges(options: dict[str, object], tmp_path: Path) -> None:
    file, wanted, scaling = adapted(tmp_path, **options)
    assert all(name.startswith("base_model.model.") for name in file)
    assert_same(merged(read_lora(file, base().state_dict(), scaling)), wanted)


def test_bfloat16_rounds_once_as_peft_does(tmp_path: Path) -> None:
    file, _, scaling = adapted(tmp_path)
    half = base().bfloat16()
    model = peft.PeftModel.from_pretrained(half, tmp_path, autocast_adapter_dtype=True)
    wanted = model.merge_and_unload().state_dict()
    lora = read_lora(file, wanted, scaling)
    for name, value in base().state_dict().items():
        assert torch.equal(lora.apply(name, value.bfloat16()), wanted[name]), name


def test_a_configuration_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    file = tmp_path / "adapter_model.safetensors"
    path.write_text(json.dumps({"lora_alpha": 8, "use_dora": True}))
    with pytest.raises(ValueError, match="DoRA, which is not merged"):
        Scaling.beside(file)
    path.write_text(json.dumps({"r": 8}))
    with pytest.raises(ValueError, match="none of a LoRA"):
        Scaling.beside(file)
    path.write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {"(": 2}}))
    with pytest.raises(ValueError, match=r"none of a LoRA.*unterminated"):
        Scaling.beside(file)
    path.unlink()
    file.write_bytes(b"xx")
    with pytest.raises(UnreadableFile, match="is damaged: it has 2 bytes"):
        Scaling.beside(file)
    file.unlink()
    assert Scaling.beside(file) == Scaling() and Scaling().of(4, "blocks.0.q") == 1.0


def test_the_configuration_that_diffusers_keeps_in_the_file(tmp_path: Path) -> None:
    """Its patterns are in diffusers' names, as the factors beside it are."""
    file = tmp_path / "pytorch_lora_weights.safetensors"
    kept = {"transformer.r": 2, "transformer.lora_alpha": 32, "transformer.alpha_pattern": {"blocks.0.attn1.to_q": 8}}
    factors = {"lora_A.weight": torch.ones(2, 24), "lora_B.weight": torch.ones(24, 2)}
    layers = ("to_q", "to_k")
    state = {f"transformer.blocks.0.attn1.{layer}.{side}": v for layer in layers for side, v in factors.items()}
    save_file({k: v.clone() for k, v in state.items()}, file, {"lora_adapter_metadata": json.dumps(kept)})
    lora = read_lora(state, base().state_dict(), Scaling.beside(file), WAN_DIFFUSERS)
    scales = {module: adapter.scale for module, adapter in lora.adapters.items()}
    assert scales == {"blocks.0.self_attn.q": 4.0, "blocks.0.self_attn.k": 16.0}


def test_a_layer_that_stands_twice_is_refused() -> None:
    weights = {"blocks.0.q.weight": torch.zeros(3, 5)}
    pair = {"lora_A.weight": torch.ones(2, 5), "lora_B.weight": torch.ones(3, 2)}
    twice = {
        f"{prefix}.blocks.0.q.{side}": value
        for prefix in ("transformer", "diffusion_model")
        for side, value in pair.items()
    }
    with pytest.raises(KeyError, match="a second time"):
        merge_lora(weights, twice, None, ())
    merge_lora(weights, dict(list(twice.items())[:2]), Scaling(8.0), ())
    assert torch.equal(weights["blocks.0.q.weight"], torch.full((3, 5), 8.0))


# -- other tools ------------------------------------------------------------------------------------------------------


def split(name: str) -> tuple[str, str]:
    module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
    return module, side


def kohya(file: State, alpha: float) -> State:
    found: State = {}
    for name, value in file.items():
        module, side = split(name)
        flat = f"lora_unet_{module.replace('.', '_')}"
        found[f"{flat}.lora_{'down' if side == 'A' else 'up'}.weight"] = value
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found


def comfy(file: State, alpha: float) -> State:
    """ComfyUI, lightx2v: our modules below `diffusion_model.`, down and up; the scale put into the factor."""
    found: State = {}
    for name, value in file.items():
        module, side = split(name)
        scaled = value if side == "A" else value * alpha / value.shape[1]
        found[f"diffusion_model.{module}.lora_{'down' if side == 'A' else 'up'}.weight"] = scaled
    return found


def diffusers(file: State, alpha: float) -> State:
    found: State = {}
    for name, value in file.items():
        module, side = split(name)
        (theirs,) = WAN_DIFFUSERS.rename(f"{module}.weight")
        scaled = value if side == "A" else value * alpha / value.shape[1]
        found[f"transformer.{theirs.removesuffix('.weight')}.lora_{side}.weight"] = scaled
    return found


def old_diffusers(file: State, alpha: float) -> State:
    down = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    return {
        name.replace(*pair): v for name, v in diffusers(file, alpha).items() for pair in down.items() if pair[0] in name
    }


def kohya_of_diffusers(file: State, alpha: float) -> State:
    """kohya's names made from diffusers' modules."""
    found: State = {}
    for name, value in file.items():
        module, side = split(name)
        (theirs,) = WAN_DIFFUSERS.rename(f"{module}.weight")
        flat = "lora_transformer_" + theirs.removesuffix(".weight").replace(".", "_")
        found[f"{flat}.lora_{'down' if side == 'A' else 'up'}.weight"] = value
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found


def liveavatar(file: State, alpha: float) -> State:
    """The published form: `.default`, no prefix, the scale given by the caller."""
    return {f"{split(n)[0]}.lora_{split(n)[1]}.default.weight": value for n, value in file.items()}


@pytest.mark.parametrize("naming", [kohya, comfy, diffusers, old_diffusers, kohya_of_diffusers, liveavatar])
def test_every_naming_merges_as_peft_merges(naming: Callable[[State, float], State], tmp_path: Path) -> None:
    file, wanted, _ = adapted(tmp_path)
    scaling = Scaling(6.0) if naming is liveavatar else Scaling()
    lora = read_lora(naming(file, 6.0), base().state_dict(), scaling, WAN_DIFFUSERS, LORA_TARGETS)
    assert_same(merged(lora), wanted)
    assert lora.rank == 4


def test_a_file_that_diffusers_saves(tmp_path: Path) -> None:
    """The adapter of diffusers' own class, saved by it, merged into our graph."""
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 8}
    theirs = WanTransformer3DModel(**sizes, ffn_dim=20, num_layers=2)
    theirs.load_state_dict(WAN_DIFFUSERS.apply(base().state_dict())[0])
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with open_weights(path) as weights:
        lora = read_lora({k: weights.read(k) for k in weights}, base().state_dict(), None, WAN_DIFFUSERS, LORA_TARGETS)
    theirs.fuse_lora()
    state = {
        name.replace(".base_layer", ""): value for name, value in theirs.state_dict().items() if "lora" not in name
    }
    assert_same(merged(lora), WAN_DIFFUSERS.invert(state))


def test_lightx2vs_differences_are_added(tmp_path: Path) -> None:
    file, _, _ = adapted(tmp_path)
    state = base().state_dict()
    more = {
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.randn(24),
        "diffusion_model.blocks.1.cross_attn.k.diff_b": torch.randn(24),
        "diffusion_model.blocks.1.diff_m": torch.randn(1, 6, 24),
        "diffusion_model.head.diff_m": torch.randn(1, 2, 24),
    }
    found = merged(read_lora(comfy(file, 6.0) | more, state, None, WAN_DIFFUSERS))
    plain = merged(read_lora(comfy(file, 6.0), state, None, WAN_DIFFUSERS))
    for ours, theirs in {
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.1.cross_attn.k.bias": "blocks.1.cross_attn.k.diff_b",
        "blocks.1.modulation": "blocks.1.diff_m",
        "head.modulation": "head.diff_m",
    }.items():
        assert torch.equal(found.pop(ours), plain.pop(ours) + more[f"diffusion_model.{theirs}"])
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


def test_an_adapter_of_a_convolution() -> None:
    """kohya's factors of a convolution: the first has its kernel, the second is 1 x 1 x 1."""
    state = base().state_dict()
    down, up = torch.randn(2, 16, 1, 2, 2), torch.randn(24, 2, 1, 1, 1)
    file = {
        "lora_unet_patch_embedding.lora_down.weight": down,
        "lora_unet_patch_embedding.lora_up.weight": up,
        "lora_unet_patch_embedding.alpha": torch.tensor(1.0),
    }
    found = merged(read_lora(file, state))
    wanted = state["patch_embedding.weight"] + 0.5 * torch.einsum("or,rcthw->octhw", up.flatten(1), down)
    torch.testing.assert_close(found["patch_embedding.weight"], wanted)


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, told",
    [
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "DoRA"),
        ("lora_unet_blocks_0_self_attn_q.hada_w1_a", "LoHa"),
        ("lora_unet_blocks_0_self_attn_q.lokr_w1", "LoKr"),
        ("diffusion_model.blocks.9.diff_b", "not in the model: blocks.9.diff_b"),
        ("lora_unet_blocks_9_ffn_0.alpha", "not in the model: blocks_9_ffn_0"),
        ("transformer.blocks.9.attn1.to_q.lora_A.weight", r"not in the model: blocks\.9\.attn1\.to_q"),
        ("lora_unet_blocks_0_self_attn_q.alpha", r"only one of lora_A and lora_B: blocks\.0\.self_attn\.q"),
    ],
)
def test_nothing_is_skipped(key: str, told: str) -> None:
    with pytest.raises(KeyError, match=told):
        read_lora({key: torch.ones(1)}, base().state_dict(), None, WAN_DIFFUSERS)


LAYER = "blocks.0.self_attn.q"
PAIR = {f"{LAYER}.lora_A.weight": torch.ones(2, 24), f"{LAYER}.lora_B.weight": torch.ones(24, 2)}


@pytest.mark.parametrize(
    "change, told",
    [
        ({".lora_A.weight": torch.tensor(1.0)}, r"lora_A torch\.float32 \(\) and .* are no factors"),
        ({".lora_B.weight": torch.ones(24)}, r"lora_B torch\.float32 \(24,\) are no factors"),
        ({".lora_A.weight": torch.ones(0, 24), ".lora_B.weight": torch.ones(24, 0)}, "are no factors"),
        ({".lora_A.weight": torch.ones(2, 24, dtype=torch.int8)}, "int8 .* are no factors"),
        ({".alpha": torch.tensor(float("nan"))}, "scale alpha / rank is nan"),
        ({".alpha": torch.ones(2)}, r"alpha is \(2,\), expected one number"),
    ],
)
def test_factors_that_are_none_are_refused(change: State, told: str) -> None:
    file = PAIR | {f"{LAYER}{ending}": value for ending, value in change.items()}
    with pytest.raises(ValueError, match=rf"{LAYER}.*{told}"):
        read_lora(file, base().state_dict(), Scaling(6.0))
    with pytest.raises(ValueError, match="scale alpha / rank is inf"):
        read_lora(PAIR, base().state_dict(), Scaling(float("inf")))


def test_a_difference_of_another_shape_is_refused() -> None:
    state = base().state_dict()
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(ValueError, match=r"head\.head\.bias: the LoRA file has \(3,\), the model \(64,\)"):
        merge_lora(state, {"diffusion_model.head.head.diff_b": torch.ones(3)}, None, targets=())
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_names_and_endings() -> None:
    assert without_prefix("diffusion_model.blocks.0.q") == "blocks.0.q"
    assert split_ending("a.lora_A.default.weight", FACTORS) == ("a", "A")
    assert split_ending("a.lora_C.weight", FACTORS) is None
    names = Names(["a.b.weight", "a_b.c.bias"])
    assert names.find("a_b.weight") == "a.b.weight" and names.find("a.b.weight") == "a.b.weight"
    assert names.find("a_b_c.bias") == "a_b.c.bias" and names.find("c.weight") is None
