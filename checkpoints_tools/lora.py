"""Merge low-rank adapters into the weights they adapt (liveavatar.md, 1.4).

W' = cast( f32(W) + (alpha / rank) * (f32(B) @ f32(A)) )
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
PREFIX = "base_model.model."
SUFFIXES = tuple(f".lora_{side}{name}.weight" for side in "AB" for name in (".default", ""))


def is_target(module: str, targets: Sequence[str] = LORA_TARGETS) -> bool:
    """Whether a module path ends in `.<target>` for one of the targets."""
    return any(f".{module}".endswith(f".{target}") for target in targets)


def split_lora_key(key: str) -> tuple[str, str] | None:
    """`[base_model.model.]<module>.lora_A[.default].weight` -> (module, "A"); None for any other key."""
    for suffix in SUFFIXES:
        if key.endswith(suffix):
            return key.removeprefix(PREFIX).removesuffix(suffix), suffix[len(".lora_")]
    return None


def _pairs(lora: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Adapters by module and side, and the tensors that are no adapters by parameter name."""
    adapters: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in lora.items():
        found = split_lora_key(key)
        if found is None:
            others[key.removeprefix(PREFIX)] = value
        else:
            module, side = found
            adapters.setdefault(module, {})[side] = value
    return adapters, others


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@torch.no_grad()
def merge_lora(
    weights: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    alpha: float,
    targets: Sequence[str] = LORA_TARGETS,
) -> list[str]:
    """Merge in place into `weights` (a state dict); returns the merged module names.

    The rank is that of the adapter. Tensors of the file that are parameters themselves replace theirs. KeyError when a
    target has no adapter, an adapter no target, or one of its two factors is missing; ValueError when shapes differ.
    """
    adapters, others = _pairs(lora)
    modules = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    wanted = {module for module in modules if is_target(module, targets)}
    if missing := wanted - adapters.keys():
        raise KeyError(f"{len(missing)} of {len(wanted)} target layers have no LoRA tensors: {_some(missing)}")
    if unmatched := {m for m in adapters if f"{m}.weight" not in weights} | {n for n in others if n not in weights}:
        raise KeyError(f"{len(unmatched)} names of the LoRA file are not in the model: {_some(unmatched)}")
    if halves := {module for module, sides in adapters.items() if len(sides) != 2}:
        raise KeyError(f"{len(halves)} layers have only one of lora_A and lora_B: {_some(halves)}")
    for module, sides in adapters.items():
        weight, a, b = weights[f"{module}.weight"], sides["A"], sides["B"]
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{module}: lora_B {tuple(b.shape)} @ lora_A {tuple(a.shape)} does not give {tuple(weight.shape)}"
            )
        delta = b.to(weight.device).float() @ a.to(weight.device).float()
        weight.copy_(weight.float() + (alpha / a.shape[0]) * delta)
    for name, value in others.items():
        weights[name].copy_(value)
    return sorted(adapters)
