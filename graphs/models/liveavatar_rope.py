"""Rotary geometry of LiveAvatar: where the tokens of a block, of the reference and of the motion frames stand in time
and space (liveavatar.md, 2.1 and 2.6).

Phases are computed analytically for any position, then rounded to float16 as the published model does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layers import rope_angles, rope_axes

REFERENCE_FRAME = 30  # time position of an unshifted reference image


@dataclass(frozen=True)
class Segment:
    """A grid of tokens: first position, number of tokens and extent of each axis (time, row, column)."""

    start: tuple[int, int, int]
    count: tuple[int, int, int]
    span: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        return self.count[0] * self.count[1] * self.count[2]


def sample_positions(start: int, count: int, span: int) -> Tensor:
    """`count` positions spread over [start, start + span), truncated to integers; a negative start counts towards 0."""
    first = abs(start)
    last = first - span + 1 if start < 0 else first + span - 1
    grid = np.trunc(np.linspace(first, last, count))
    return torch.from_numpy(-grid if start < 0 else grid)


def grid_table(frames: Tensor, rows: Tensor, columns: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Table [..., F*H*W, d/2, 2] in float32 (cos, sin), rounded to `dtype`; frames [..., F], rows [H], columns [W]."""
    axes = (frames[..., :, None, None], rows[:, None], columns)
    shape = torch.broadcast_shapes(*(axis.shape for axis in axes))  # [..., F, H, W]
    parts = []
    for axis, channels in zip(axes, rope_axes(head_dim), strict=True):
        angles = rope_angles(axis, channels)
        table = torch.stack((angles.cos(), angles.sin()), -1).float().to(dtype).float()
        parts.append(table.expand(*shape, -1, -1))
    return torch.cat(parts, -2).flatten(-5, -3)


def segment_table(
    segments: Sequence[Segment], head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Table [sum of tokens, d/2, 2] of consecutive segments; empty ones are skipped."""
    tables = []
    for segment in segments:
        if segment.tokens:
            frames, rows, columns = (
                sample_positions(*axis).to(device)
                for axis in zip(segment.start, segment.count, segment.span, strict=True)
            )
            tables.append(grid_table(frames, rows, columns, head_dim, dtype))
    if not tables:
        return torch.empty(0, head_dim // 2, 2, device=device)
    return torch.cat(tables)


def frame_table(
    first: int | Tensor,
    frames: int,
    grid: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Table of consecutive frames from `first` on a (rows, columns) grid of patches.

    `first` int or 0-dim tensor: [F*H*W, d/2, 2]; [B] tensor: [B, F*H*W, d/2, 2].
    """
    offset = torch.as_tensor(first, dtype=torch.float64, device=device)
    times = offset[..., None] + torch.arange(frames, dtype=torch.float64, device=device)
    rows, columns = (torch.arange(n, dtype=torch.float64, device=device) for n in grid)
    return grid_table(times, rows, columns, head_dim, dtype)


def ref_shift(frame: int, distance: int) -> int:
    """Shift of the reference for a block that starts at latent frame `frame`: it stays `distance` frames ahead.

    The published model draws `distance` uniformly from 4..30 for every block and step (2.6).
    """
    return max(0, frame - (REFERENCE_FRAME - distance))
