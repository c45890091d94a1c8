"""Bilinear resize of 8-bit pictures in 11-bit fixed point, as OpenCV does it: the scores are defined on its pixels."""

import torch
from torch import Tensor

ONE = 1 << 11


def _axis(source: int, target: int, pitch: float) -> tuple[Tensor, Tensor, Tensor]:
    """Left index, right index and right weight (of ONE) for each target position; ends are repeated."""
    position = ((torch.arange(target, dtype=torch.float64) + 0.5) * pitch - 0.5).float()
    left = position.floor()
    weight = torch.where((left >= 0) & (left < source - 1), position - left, 0.0)
    index = left.long().clamp(0, source - 1)
    return index, (index + 1).clamp(max=source - 1), (weight * ONE).round().int()


def resize(picture: Tensor, size: tuple[int, int], scale: float | None = None) -> Tensor:
    """uint8 [H, W, C] -> uint8 [*size, C], no antialiasing.

    `scale` is the factor that `size` was rounded from; without it the picture fills `size` exactly.
    """
    if picture.dtype != torch.uint8 or 0 in picture.shape or min(size) < 1:
        raise ValueError(
            f"resize: needs a uint8 picture and a size, got {picture.dtype} {list(picture.shape)} to {size}"
        )
    height, width = picture.shape[:2]
    top, bottom, down = _axis(height, size[0], 1 / scale if scale else height / size[0])
    left, right, across = _axis(width, size[1], 1 / scale if scale else width / size[1])
    x = picture.int()
    rows = (x[:, left] * (ONE - across)[:, None] + x[:, right] * across[:, None]) >> 4  # [H, w, C]
    upper = rows[top] * (ONE - down)[:, None, None] >> 16
    lower = rows[bottom] * down[:, None, None] >> 16
    return ((upper + lower + 2) >> 2).clamp(0, 255).to(torch.uint8)
