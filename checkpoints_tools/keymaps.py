"""Key tables: names in the published files <-> names in the modules that run them.

A template names one key; `{x}` stands for exactly one dotted component and means the same text on both sides. The
first rule whose template matches decides. A rule with several targets splits the tensor in equal parts along its
rows (and joins them on the way back). Keys of the file that no system reads are listed as `unused`, never guessed.

Sources: wan.md 1.4-1.6 (names in the files), 2.2.1 (UMT5), 2.3.8 (VAE), 2.4 (CLIP), 2.5.3 (wav2vec 2.0).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

PLACE = re.compile(r"\\{(\w+)\\}")


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression that matches the keys of `template`, one group per placeholder."""
    return re.compile(PLACE.sub(r"(?P<\1>[^.]+)", re.escape(template)))


@dataclass(frozen=True)
class Rule:
    """One line of a table: `published` template -> one or several `ours`.

    `leading` counts the leading dimensions of size one that the published tensor has and ours has not.
    """

    published: str
    ours: tuple[str, ...]
    leading: int = 0
    forward: re.Pattern[str] = field(init=False, repr=False, compare=False)
    backward: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", _pattern(self.published))
        object.__setattr__(self, "backward", _pattern(self.ours[0]))


def rules(*lines: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules with one target each."""
    return tuple(Rule(published, (ours,)) for published, ours in lines)


@dataclass(frozen=True)
class KeyMap:
    """A table of rules, the prefixes of published keys that stay unread, and our keys that a file may lack."""

    name: str
    table: tuple[Rule, ...]
    unused: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def is_unused(self, key: str) -> bool:
        """Whether the published key is one that no system reads."""
        return key.startswith(self.unused) if self.unused else False

    def rename(self, key: str) -> tuple[str, ...]:
        """Our key(s) of a published key; empty when no rule knows it."""
        for rule in self.table:
            if match := rule.forward.fullmatch(key):
                return tuple(target.format(**match.groupdict()) for target in rule.ours)
        return ()

    def original(self, key: str) -> str | None:
        """The published key that holds our key; None when no rule knows it."""
        for rule in self.table:
            for target in rule.ours:
                if match := (rule.backward if target == rule.ours[0] else _pattern(target)).fullmatch(key):
                    return rule.published.format(**match.groupdict())
        return None

    def inverse(self) -> "KeyMap":
        """The table from ours to the published names, to load files that have ours; ValueError when it splits."""
        for rule in self.table:
            if len(rule.ours) > 1 or rule.leading:
                raise ValueError(f"{self.name}: {rule.published} is split or reshaped; use invert() on a state dict")
        return KeyMap(f"{self.name}, backwards", tuple(Rule(r.ours[0], (r.published,)) for r in self.table))

    def apply(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Published state -> (ours, keys that no rule knows). Unused keys are dropped, tensors are views."""
        mapped: dict[str, Tensor] = {}
        unknown = []
        for key, value in state.items():
            if self.is_unused(key):
                continue
            for rule in self.table:
                if match := rule.forward.fullmatch(key):
                    break
            else:
                unknown.append(key)
                continue
            names = [target.format(**match.groupdict()) for target in rule.ours]
            if value.shape[: rule.leading] == (1,) * rule.leading:
                value = value.reshape(value.shape[rule.leading :])
            # rows that do not divide give parts of unequal sizes, which a comparison of shapes then finds
            parts = value.tensor_split(len(names)) if len(names) > 1 and value.ndim else (value,) * len(names)
            mapped.update(zip(names, parts, strict=True))
        return mapped, unknown

    def invert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state -> the published layout, in the order of `state`.

        Raises KeyError for a key that the table does not know and for a missing part of a split tensor.
        """
        published: dict[str, Tensor] = {}
        for key in state:
            for rule in self.table:
                if match := rule.backward.fullmatch(key):
                    parts = [state[target.format(**match.groupdict())] for target in rule.ours]
                    value = torch.cat(parts) if len(parts) > 1 else parts[0]
                    value = value.reshape((1,) * rule.leading + tuple(value.shape))
                    published[rule.published.format(**match.groupdict())] = value
                    break
            else:
                if self.original(key) is None:  # later parts of a split tensor came with the first
                    raise KeyError(f"{self.name}: the key table does not know {key!r}")
        return published


@dataclass(frozen=True)
class SameNames(KeyMap):
    """The table of a module that is named like its file."""

    table: tuple[Rule, ...] = ()

    def rename(self, key: str) -> tuple[str, ...]:
        return () if self.is_unused(key) else (key,)

    def original(self, key: str) -> str | None:
        return key

    def apply(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        return {key: value for key, value in state.items() if not self.is_unused(key)}, []

    def invert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state)


UMT5 = KeyMap(
    "UMT5 encoder",
    rules(
        ("token_embedding.weight", "shared.weight"),
        ("norm.weight", "encoder.final_layer_norm.weight"),
        ("blocks.{i}.norm1.weight", "encoder.block.{i}.layer.0.layer_norm.weight"),
        ("blocks.{i}.norm2.weight", "encoder.block.{i}.layer.1.layer_norm.weight"),
        (
            "blocks.{i}.pos_embedding.embedding.weight",
            "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        ("blocks.{i}.attn.{qkvo}.weight", "encoder.block.{i}.layer.0.SelfAttention.{qkvo}.weight"),
        ("blocks.{i}.ffn.gate.0.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight"),
        ("blocks.{i}.ffn.fc1.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight"),
        ("blocks.{i}.ffn.fc2.weight", "encoder.block.{i}.layer.1.DenseReluDense.wo.weight"),
    ),
)


def _clip_table() -> tuple[Rule, ...]:
    layer = "vision_model.encoder.layers.{j}"
    qkv = tuple(f"{layer}.self_attn.{part}_proj.{{w}}" for part in "qkv")
    return (
        Rule("visual.cls_embedding", ("vision_model.embeddings.class_embedding",), leading=2),
        Rule("visual.pos_embedding", ("vision_model.embeddings.position_embedding.weight",), leading=1),
        *rules(
            ("visual.patch_embedding.weight", "vision_model.embeddings.patch_embedding.weight"),
            ("visual.pre_norm.{w}", "vision_model.pre_layrnorm.{w}"),
            ("visual.post_norm.{w}", "vision_model.post_layernorm.{w}"),
            ("visual.transformer.{j}.norm1.{w}", f"{layer}.layer_norm1.{{w}}"),
            ("visual.transformer.{j}.norm2.{w}", f"{layer}.layer_norm2.{{w}}"),
        ),
        Rule("visual.transformer.{j}.attn.to_qkv.{w}", qkv),
        *rules(
            ("visual.transformer.{j}.attn.proj.{w}", f"{layer}.self_attn.out_proj.{{w}}"),
            ("visual.transformer.{j}.mlp.0.{w}", f"{layer}.mlp.fc1.{{w}}"),
            ("visual.transformer.{j}.mlp.2.{w}", f"{layer}.mlp.fc2.{{w}}"),
        ),
    )


def clip_unread_shapes(
    image_dim: int = 1280, embed_dim: int = 1024, vocab: int = 250002, positions: int = 514, layers: int = 24
) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of what the CLIP file holds beside the image tower: projection, text tower, scale.

    The text tower is XLM-RoBERTa-large, of width `embed_dim`; no system reads it (wan.md 1.6).
    """
    dim = embed_dim
    shapes: dict[str, tuple[int, ...]] = {"log_scale": (), "visual.head": (image_dim, embed_dim)}
    for table, rows in (("token", vocab), ("type", 1), ("pos", positions)):
        shapes[f"textual.{table}_embedding.weight"] = (rows, dim)
    linears = {f"attn.{part}": (dim, dim) for part in "qkvo"} | {"ffn.0": (4 * dim, dim), "ffn.2": (dim, 4 * dim)}
    for block in range(layers):
        for name, shape in linears.items():
            shapes[f"textual.blocks.{block}.{name}.weight"] = shape
            shapes[f"textual.blocks.{block}.{name}.bias"] = shape[:1]
        for norm in ("norm1", "norm2"):
            shapes |= {f"textual.blocks.{block}.{norm}.{part}": (dim,) for part in ("weight", "bias")}
    shapes |= {f"textual.norm.{part}": (dim,) for part in ("weight", "bias")}
    shapes |= {f"textual.head.{layer}.weight": (dim, dim) for layer in (0, 2)}
    return shapes


CLIP = KeyMap("CLIP image tower", _clip_table(), unused=("textual.", "log_scale", "visual.head"))


def _wav2vec2_table() -> tuple[Rule, ...]:
    conv = "encoder.pos_conv_embed.conv"
    return rules(
        (f"{conv}.weight_g", f"{conv}.parametrizations.weight.original0"),
        (f"{conv}.weight_v", f"{conv}.parametrizations.weight.original1"),
        (f"{conv}.parametrizations.weight.{{part}}", f"{conv}.parametrizations.weight.{{part}}"),
        (f"{conv}.bias", f"{conv}.bias"),
        ("masked_spec_embed", "masked_spec_embed"),
        ("feature_extractor.conv_layers.{i}.{m}.{w}", "feature_extractor.conv_layers.{i}.{m}.{w}"),
        ("feature_projection.{m}.{w}", "feature_projection.{m}.{w}"),
        ("encoder.layer_norm.{w}", "encoder.layer_norm.{w}"),
        ("encoder.layers.{i}.{m}.{w}", "encoder.layers.{i}.{m}.{w}"),
        ("encoder.layers.{i}.{m}.{n}.{w}", "encoder.layers.{i}.{m}.{n}.{w}"),
    )


def wav2vec2_keymap(keys: Iterable[str], *, old_weight_norm: bool = False) -> KeyMap:
    """The table for a file with these keys: encoder alone, or below `wav2vec2.` beside heads that stay unread.

    `old_weight_norm` decides how the positional convolution is named on the way back (`KeyMap.invert`); both names
    are read (wan.md 2.5.3). `masked_spec_embed` is read by training alone, and some published files lack it.
    """
    table = _wav2vec2_table()
    table = table if old_weight_norm else (*table[2:], *table[:2])
    if any(key.startswith("wav2vec2.") for key in keys):
        table = tuple(Rule(f"wav2vec2.{rule.published}", rule.ours, rule.leading) for rule in table)
    heads = ("lm_head.", "quantizer.", "project_q.", "project_hid.")
    return KeyMap("wav2vec 2.0 encoder", table, unused=heads, optional=("masked_spec_embed",))


RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.{w}", "conv1.{w}"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.{w}", "conv2.{w}"),
    ("shortcut.{w}", "conv_shortcut.{w}"),
)
RESAMPLER = (("resample.1.{w}", "resample.1.{w}"), ("time_conv.{w}", "time_conv.{w}"))
ATTENTION = (("norm.gamma", "norm.gamma"), ("to_qkv.{w}", "to_qkv.{w}"), ("proj.{w}", "proj.{w}"))


def vae_diffusers_keymap(levels: int = 4, res_blocks: int = 2) -> KeyMap:
    """Table Wan VAE -> diffusers `AutoencoderKLWan` (wan.md 2.3.8).

    `levels` resolutions and `res_blocks` residual blocks a level in the encoder (one more in the decoder); the flat
    index of the decoder depends on them.
    """
    found = [("conv1.{w}", "quant_conv.{w}"), ("conv2.{w}", "post_quant_conv.{w}")]

    def below(published: str, ours: str, parts: tuple[tuple[str, str], ...]) -> None:
        found.extend((f"{published}.{a}", f"{ours}.{b}") for a, b in parts)

    for side in ("encoder", "decoder"):
        below(side, side, (("conv1.{w}", "conv_in.{w}"), ("head.0.gamma", "norm_out.gamma")))
        below(side, side, (("head.2.{w}", "conv_out.{w}"),))
        for middle, resnet in ((0, 0), (2, 1)):
            below(f"{side}.middle.{middle}", f"{side}.mid_block.resnets.{resnet}", RESIDUAL)
        below(f"{side}.middle.1", f"{side}.mid_block.attentions.0", ATTENTION)
    below("encoder.downsamples.{n}", "encoder.down_blocks.{n}", RESIDUAL + RESAMPLER)
    for level in range(levels):
        first = level * (res_blocks + 2)
        for block in range(res_blocks + 1):
            below(f"decoder.upsamples.{first + block}", f"decoder.up_blocks.{level}.resnets.{block}", RESIDUAL)
        last = f"decoder.upsamples.{first + res_blocks + 1}"
        below(last, f"decoder.up_blocks.{level}.upsamplers.0", RESAMPLER)
    return KeyMap("Wan VAE in diffusers", rules(*found))
