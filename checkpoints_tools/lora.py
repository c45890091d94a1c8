"""Merge low-rank adapters into the weights they adapt (liveavatar.md, 1.4).

W' = cast( f32(W) + (alpha / rank) * (f32(B) @ f32(A)) )

`read_lora` understands the names of `lora_names.py`; `Lora.apply` changes one tensor, so that a loader can merge on the
way; `merge_lora` changes a whole state dict.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .keymaps import KeyMap
from .lora_names import (
    ALPHA,
    DIFFERENCES,
    FACTORS,
    OTHER_METHODS,
    Names,
    split_ending,
    without_prefix,
)
from .safetensors_header import UnreadableFile, read_metadata

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # the same in the metadata of a safetensors file


def is_target(module: str, targets: Sequence[str] = LORA_TARGETS) -> bool:
    """Whether a module path ends in `.<target>` for one of the targets."""
    return any(f".{module}".endswith(f".{target}") for target in targets)


def split_lora_key(key: str) -> tuple[str, str] | None:
    """`[base_model.model.]<module>.lora_A[.default].weight` -> (module, "A"); None for any other key."""
    return split_ending(
        key.removeprefix(PREFIX), {k: v for k, v in FACTORS.items() if ".lora_A" in k or ".lora_B" in k}
    )


@dataclass(frozen=True)
class Scaling:
    """What the product of the factors is multiplied by where the file itself has no `.alpha`.

    `alpha` None stands for the rank, i.e. a scale of one; `by_root` divides by the root of the rank (rsLoRA);
    `patterns` gives modules whose path, in our names or in the file's, ends in the pattern (a regular expression) an
    alpha of their own.
    """

    alpha: float | None = None
    by_root: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)

    def of(self, rank: int, *names: str) -> float:
        """alpha / rank of the module that has these names."""
        matching = (a for p, a in self.patterns.items() if any(re.fullmatch(rf"(.*\.)?({p})", name) for name in names))
        own = next(matching, self.alpha)
        return 1.0 if own is None else own / (math.sqrt(rank) if self.by_root else rank)

    @classmethod
    def beside(cls, file: Path) -> "Scaling":
        """From the `adapter_config.json` in the folder of an adapter file, or the same kept in a safetensors file's
        metadata, as diffusers does; a scale of one where there is neither.

        Raises ValueError for a configuration that is none or that asks for more than LoRA.
        """
        path = file.parent / PEFT_CONFIG
        try:
            text = path.read_text() if path.is_file() else _kept_config(file)
            if text is None:
                return cls()
            # diffusers' pipelines put the model before each name: "transformer.r"
            config = {key.rpartition(".")[2]: value for key, value in json.loads(text).items()}
            scaling = cls(
                float(config["lora_alpha"]),
                bool(config.get("use_rslora")),
                {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            )
            for pattern in scaling.patterns:
                re.compile(pattern)
        except UnreadableFile:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
            raise ValueError(f"the configuration of {file} is none of a LoRA ({error!r})") from error
        if config.get("use_dora"):
            raise ValueError(f"{file} is DoRA, which is not merged; merge it with peft's merge_and_unload first")
        return scaling


def _kept_config(file: Path) -> str | None:
    known = file.suffix == ".safetensors" and file.is_file()
    return read_metadata(file).get(DIFFUSERS_CONFIG) if known else None


@dataclass(frozen=True)
class Adapter:
    """The factors of one layer: `a` [rank, inputs], `b` [outputs, rank] (of a convolution: with its kernel)."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self, like: Tensor) -> Tensor:
        """scale * B @ A in float32, in the shape and on the device of the weight `like`."""
        product = self.b.to(like.device).float().flatten(1) @ self.a.to(like.device).float().flatten(1)
        return self.scale * product.view(like.shape)


@dataclass(frozen=True)
class Lora:
    """An adapter file in our names: factors by module; differences and whole tensors by parameter."""

    adapters: dict[str, Adapter]
    differences: dict[str, Tensor]
    replaced: dict[str, Tensor]

    @property
    def changed(self) -> set[str]:
        """The parameters that `apply` changes."""
        return {f"{module}.weight" for module in self.adapters} | self.differences.keys() | self.replaced.keys()

    @property
    def rank(self) -> int:
        """The largest rank of an adapter, 0 without adapters."""
        return max((adapter.a.shape[0] for adapter in self.adapters.values()), default=0)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The parameter `name` after the merge, in its own dtype and on its device; itself when nothing changes it."""
        if name in self.replaced:
            weight = self.replaced[name].to(weight)
        if name in self.differences:
            weight = (weight.float() + self.differences[name].to(weight.device).float()).to(weight.dtype)
        adapter = self.adapters.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return weight if adapter is None else (weight.float() + adapter.delta(weight)).to(weight.dtype)

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """ValueError for tensors that do not fit the shapes of the model."""
        for module, adapter in self.adapters.items():
            a, b, weight = adapter.a, adapter.b, tuple(shapes[f"{module}.weight"])
            fits = (b.shape[0], *a.shape[1:]) == weight and math.prod(b.shape[2:]) == 1
            if not fits or a.shape[0] != b.shape[1]:
                raise ValueError(f"{module}: lora_B {tuple(b.shape)} @ lora_A {tuple(a.shape)} does not give {weight}")
        for name, value in [*self.differences.items(), *self.replaced.items()]:
            if tuple(value.shape) != tuple(shapes[name]):
                raise ValueError(f"{name}: the LoRA file has {tuple(value.shape)}, the model {tuple(shapes[name])}")


def read_lora(
    state: Mapping[str, Tensor],
    parameters: Iterable[str],
    scaling: Scaling | None = None,
    keymap: KeyMap | None = None,
    targets: Sequence[str] = (),
) -> Lora:
    """The tensors of an adapter file, told in the names of a model with `parameters`; nothing is skipped.

    `keymap`: table from our names to those of another library that the file may use. A `.alpha` in the file decides
    over `scaling`. KeyError for a layer of `targets` without an adapter, names that the model has not, half a pair of
    factors, and other methods than LoRA. ValueError for factors that are no matrices of floating numbers, a rank of
    zero, and a scale that is no finite number.
    """
    known = list(parameters)
    names, scaling = Names(known, keymap), scaling or Scaling()
    factors: dict[str, dict[str, Tensor]] = {}
    theirs: dict[str, str] = {}  # how the file calls a layer, which is how its configuration does
    alphas: dict[str, float] = {}
    differences: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    unmatched: set[str] = set()
    for key, value in state.items():
        if other := split_ending(key, OTHER_METHODS):
            raise KeyError(f"{key} belongs to {other[1]}, which is not merged; merge it with the tool that made it")
        name = without_prefix(key)
        if found := split_ending(name, FACTORS):
            if ours := names.find(f"{found[0]}.weight"):
                module = ours.removesuffix(".weight")
                theirs[module], sides = found[0], factors.setdefault(module, {})
                if found[1] in sides:
                    raise KeyError(f"{key} stands for {ours} a second time; take one of the two out of the file")
                sides[found[1]] = value
            else:
                unmatched.add(found[0])
        elif name.endswith(ALPHA):
            if ours := names.find(f"{name.removesuffix(ALPHA)}.weight"):
                alphas[ours.removesuffix(".weight")] = _number(key, value)
            else:
                unmatched.add(name.removesuffix(ALPHA))
        else:
            found = split_ending(name, DIFFERENCES)
            ours = names.find("".join(found)) if found else names.find(name)
            if ours is None:
                unmatched.add(name)
            else:
                (differences if found else replaced)[ours] = value
    wanted = {name.removesuffix(".weight") for name in known if name.endswith(".weight")}
    wanted = {module for module in wanted if is_target(module, targets)}
    if missing := wanted - factors.keys():
        raise KeyError(f"{len(missing)} of {len(wanted)} target layers have no LoRA tensors: {_some(missing)}")
    if unmatched:
        raise KeyError(f"{len(unmatched)} names of the LoRA file are not in the model: {_some(unmatched)}")
    if halves := {module for module, sides in factors.items() if len(sides) != 2} | (alphas.keys() - factors.keys()):
        raise KeyError(f"{len(halves)} layers have only one of lora_A and lora_B: {_some(halves)}")
    adapters = {}
    for module, sides in factors.items():
        a, b = sides["A"], sides["B"]
        if min(a.ndim, b.ndim) < 2 or not a.shape[0] or not (a.is_floating_point() and b.is_floating_point()):
            shown = " and ".join(f"lora_{side} {t.dtype} {tuple(t.shape)}" for side, t in (("A", a), ("B", b)))
            raise ValueError(f"{module}: {shown} are no factors of a weight; check which file this is")
        rank = a.shape[0]
        scale = alphas[module] / rank if module in alphas else scaling.of(rank, theirs[module], module)
        if not math.isfinite(scale):
            raise ValueError(f"{module}: its scale alpha / rank is {scale}; set a finite alpha for it")
        adapters[module] = Adapter(a, b, scale)
    return Lora(adapters, differences, replaced)


def _number(key: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(f"{key} is {tuple(value.shape)}, expected one number")
    return float(value)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@torch.no_grad()
def merge_lora(
    weights: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    alpha: float | Scaling | None,
    targets: Sequence[str] = LORA_TARGETS,
    keymap: KeyMap | None = None,
) -> list[str]:
    """Merge in place into `weights` (a state dict); returns the merged module names.

    The rank is that of the adapter; `alpha` None stands for the rank, `Scaling.beside(file)` is what the file's own
    configuration says. Tensors of the file that are parameters
    themselves replace theirs. KeyError when a target has no adapter, an adapter no target, or one of its two factors
    is missing; ValueError when shapes differ. Nothing is changed then.
    """
    scaling = alpha if isinstance(alpha, Scaling) else Scaling(alpha)
    found = read_lora(lora, weights, scaling, keymap, targets)
    found.check({name: value.shape for name, value in weights.items()})
    for name in found.changed:
        weights[name].copy_(found.apply(name, weights[name]))
    return sorted(found.adapters)
