"""Face masks of several speakers -> which tokens hear which voice (liveavatar.md, 3.10)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class ActorMasks:
    """Masks [A, F, Hp, Wp, 1] float32 of 0 and 1, one value per token: `routing` is what the model takes."""

    assigned: Tensor
    dilated: Tensor
    routing: Tensor


def _assign(mask: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """Pixel masks [T, h, w] -> patches [F, Hp, Wp] that are covered by more than half."""
    binary = (mask > 0).float()[None, None]
    patches = F.interpolate(binary, (frames, rows, columns), mode="trilinear", align_corners=False)
    return (patches > 0.5)[0, 0]


def _box_side(frame: Tensor) -> int:
    """Longer side of the box around the set patches of [Hp, Wp]; 0 when none is set."""
    rows, columns = frame.nonzero(as_tuple=True)
    if not len(rows):
        return 0
    return int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1


def _dilate(mask: Tensor, ratio: float, offset: float) -> Tensor:
    """Grow [F, Hp, Wp] frame by frame by max(1, int(ratio * box + offset)) patches."""
    grown = []
    for frame in mask.float():
        side = _box_side(frame)
        radius = max(1, int(ratio * side + offset)) if side else 0
        grown.append(F.max_pool2d(frame[None, None], 2 * radius + 1, stride=1, padding=radius)[0, 0])
    return torch.stack(grown) > 0


def actor_masks(
    masks: list[Tensor],
    height: int,
    width: int,
    frames: int = 12,
    *,
    patch_pixels: int = 16,
    dilation_ratio: float = 0.1,
    dilation_offset: float = 0.9999,
) -> ActorMasks:
    """Token masks of every speaker, left to right, from their face masks (> 0 is face).

    Shapes: each mask [h, w] or [T, h, w], any size; results [A, frames, height / 16, width / 16, 1]. A patch covered
    by two faces belongs to the later one. A token hears actor a unless another actor's grown face covers it, so the
    background hears everyone.
    Errors: InputError without a mask, or for a mask of another rank.
    """
    if not masks:
        raise InputError("several speakers need one mask each; pass at least one mask")
    if any(m.dim() not in (2, 3) for m in masks):
        raise InputError(f"masks have shapes {[tuple(m.shape) for m in masks]}; [h, w] or [T, h, w] is needed")
    grid = frames, height // patch_pixels, width // patch_pixels
    covered = torch.stack([_assign(m if m.dim() == 3 else m[None], *grid) for m in masks])  # [A, F, Hp, Wp]
    claimed_later = covered.flip(0).cumsum(0).flip(0) - covered.int()
    assigned = covered & (claimed_later == 0)
    dilated = torch.stack([_dilate(m, dilation_ratio, dilation_offset) for m in assigned])
    others = dilated.sum(0) - dilated.int()  # [A, F, Hp, Wp]: faces of the others at this token
    routing = others == 0
    return ActorMasks(*(m.float()[..., None] for m in (assigned, dilated, routing)))
