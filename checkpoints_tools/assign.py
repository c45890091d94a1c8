"""Putting a published state dict into a module by its key table, or saying by name what does not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .keymaps import KeyMap

SHOWN = 12
MISFIT = "of another shape or type"


class KeyMismatch(ValueError):
    """The tensors of a file do not fit the module; `missing`, `unexpected` and `misshaped` hold the published names."""

    def __init__(self, name: str, missing: list[str], unexpected: list[str], misshaped: list[str]):
        self.missing, self.unexpected, self.misshaped = missing, unexpected, misshaped
        parts = [
            f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{' ...' if len(keys) > SHOWN else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), (MISFIT, misshaped))
            if keys
        ]
        super().__init__(f"the weights are not those of the {name}; {'; '.join(parts)}; check which file this is")


def misfit(value: Tensor, wanted: Tensor) -> str:
    """What is wrong with a tensor in the place of `wanted`; empty when it fits."""
    if value.is_floating_point() != wanted.is_floating_point():
        return f"{value.dtype} {list(value.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
    return "" if value.shape == wanted.shape else f"{list(value.shape)}, expected {list(wanted.shape)}"


def map_names(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], keymap: KeyMap) -> dict[str, Tensor]:
    """`state` in our names, compared with the tensors `wanted` of a module; both may lie on the meta device.

    Floating tensors may have any precision. Parameters that the table calls optional may be absent from the result.
    Raises KeyMismatch.
    """
    mapped, unexpected = keymap.apply(state)

    def published(key: str) -> str:
        return keymap.original(key) or key

    missing = [published(key) for key in wanted if key not in mapped and key not in keymap.optional]
    unexpected += [published(key) for key in mapped if key not in wanted]
    pairs = ((published(key), value, wanted[key]) for key, value in mapped.items() if key in wanted)
    misshaped = [f"{name} {wrong}" for name, value, other in pairs if (wrong := misfit(value, other))]
    if missing or unexpected or misshaped:
        raise KeyMismatch(keymap.name, list(dict.fromkeys(missing)), list(dict.fromkeys(unexpected)), misshaped)
    return mapped


def assign_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    keymap: KeyMap,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Replace every parameter of `module` (which may lie on the meta device) by its tensor of `state`.

    `state` has published names. Floating tensors are cast to `dtype`, all are moved to `device`. Parameters that the
    table calls optional become zeros when the file lacks them. Raises KeyMismatch; nothing is skipped silently.
    """
    wanted = dict(module.named_parameters())  # a tensor tied under two names counts once
    mapped = map_names(wanted, state, keymap)
    for key in keymap.optional:
        if key in wanted and key not in mapped:
            mapped[key] = torch.zeros(wanted[key].shape)
    for key, value in mapped.items():
        mapped[key] = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    module.load_state_dict(mapped, strict=False, assign=True)
