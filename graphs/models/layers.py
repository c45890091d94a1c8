"""Building blocks that every Wan-family graph shares.

Precision of the plain path. A parameter keeps the dtype it was loaded in. `Linear.compute_dtype` is the dtype in
which a layer multiplies (None: the weight's own), which is what autocast decides upstream; layers marked `island`
always multiply in float32. Everything between the layers follows torch's promotion (wan.md, 2.3.5).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops


class Linear(nn.Linear):
    """`nn.Linear` with an explicit compute dtype and one rounding of the result."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, island: bool = False):
        super().__init__(in_features, out_features, bias)
        self.island = island

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # a weight that torchao quantised has no `to` in inference mode
        weight = self.weight if self.weight.dtype == dtype else self.weight.to(dtype)
        return ops.linear(x, weight, bias)


class PatchConv(nn.Conv3d):
    """Convolution with kernel = stride, as one product; half precision rounds the float32 sum, adds the bias and
    rounds again."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, in_channels: int, out_channels: int, patch: tuple[int, int, int]):
        super().__init__(in_channels, out_channels, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, D, F / pt, H / ph, W / pw], where D lies innermost; remainders are dropped."""
        dtype = self.compute_dtype or self.weight.dtype
        weight, bias = self.weight.to(dtype).flatten(1), self.bias.to(dtype)  # type: ignore[union-attr]
        for axis, size in zip((2, 4, 6), self.kernel_size, strict=True):
            patches = x.shape[axis] // size
            x = x.narrow(axis, 0, patches * size).unflatten(axis, (patches, size))
        rows = x.to(dtype).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, F / pt, H / ph, W / pw, C * pt * ph * pw]
        whole = dtype == torch.float32  # in half precision the bias is no part of the sum
        tokens = F.linear(rows, weight, bias) if whole else F.linear(rows, weight) + bias
        return tokens.movedim(-1, 1)


class RmsNorm(nn.Module):
    """Full-width RMS norm weight; the formula is `kernels.norm.rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Affine layer norm in float32, cast back to the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def mlp(dim_in: int, hidden: int, dim_out: int, activation: nn.Module, *, island: bool = False) -> nn.Sequential:
    """Linear, activation, Linear under the published keys `0` and `2`."""
    return nn.Sequential(Linear(dim_in, hidden, island=island), activation, Linear(hidden, dim_out, island=island))


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None, islands: bool = True) -> None:
    """Multiply in `dtype` everywhere in `model`; layers marked as islands stay float32 unless `islands` is False."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute_dtype = torch.float32 if module.island and islands else dtype
        elif isinstance(module, PatchConv):
            module.compute_dtype = dtype


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Time sinusoid [..., dim] of t [...]: cosines then sines of t * 10000^(-2j/dim), in float64."""
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.double()[..., None] * torch.pow(10000.0, -powers)
    return torch.cat((angles.cos(), angles.sin()), -1)


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of the time, height and width groups of a head: d - 4(d//6), 2(d//6), 2(d//6)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_angles(positions: Tensor, channels: int) -> Tensor:
    """Phases [..., channels / 2] in float64 of one axis group: position * 10000^(-2j/channels)."""
    powers = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / channels
    return positions.double()[..., None] * torch.pow(10000.0, -powers)


def rope_table(frames: Tensor, rows: Tensor, columns: Tensor, head_dim: int) -> Tensor:
    """Rotary table [N, d/2, 2] in float64 (cos, sin) of N positions (frame, row, column)."""
    places = zip((frames, rows, columns), rope_axes(head_dim), strict=True)
    phase = torch.cat([rope_angles(axis, channels) for axis, channels in places], -1)  # [N, d/2]
    return torch.stack((phase.cos(), phase.sin()), -1)


def rope_grid(frames: Tensor, rows: Tensor, columns: Tensor, head_dim: int) -> Tensor:
    """Rotary table [F * H * W, d/2, 2] in float64 (cos, sin) for a grid of positions, row-major over (f, h, w)."""
    grid = torch.meshgrid(frames, rows, columns, indexing="ij")
    return rope_table(grid[0].flatten(), grid[1].flatten(), grid[2].flatten(), head_dim)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """[B, F*H*W, pt*ph*pw*C] (channel fastest) -> [B, C, F*pt, H*ph, W*pw]; surplus tokens are dropped."""
    count = math.prod(grid)
    x = tokens[:, :count].unflatten(1, grid).unflatten(-1, (*patch, -1))  # [B, F, H, W, pt, ph, pw, C]
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
