"""What the row-wise Triton kernels share: a program holds a row [D] in registers, cut into pieces of a power of two.

D of these models is no power of two (5120 = 5 x 1024); a masked block of 8192 would idle three lanes in eight. A row is
therefore a tuple of PIECES blocks, of which only the last can have a tail, filled with zeros.
All values are float32 in registers; `rounded` puts them on the grid of another dtype where the reference rounds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_THREAD = 56
"""The longest share of a row that a thread keeps in registers."""


class Tile(NamedTuple):
    """How a row is spread over one program."""

    block: int
    num_warps: int

    def pieces(self, dim: int) -> int:
        return triton.cdiv(dim, self.block)


def tile(dim: int) -> Tile:
    """Fewest warps that hold a row of `dim`, eight neighbouring values a thread and piece (16 bytes of bf16)."""
    warps = 1
    while warps < 16 and dim > warps * 32 * VALUES_PER_THREAD:
        warps *= 2
    return Tile(min(256 * warps, triton.next_power_of_2(dim)), warps)


_TRITON = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of `dtype`; TypeError when the row kernels do not compute in it."""
    if dtype not in _TRITON:
        raise TypeError(f"{dtype} is not supported by the fused ops; use float32, bfloat16 or float16")
    return _TRITON[dtype]


def row_major(x: Tensor) -> Tensor:
    """x itself when its last axis is dense, else a dense copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x on the grid of DTYPE, still float32."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def load_piece(row, i: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Piece i of a table row that many programs read; float32, zeros beyond the end."""
    cols = i * BLOCK + tl.arange(0, BLOCK)
    if (i + 1) * BLOCK <= DIM:
        return tl.load(row + cols).to(tl.float32)
    return tl.load(row + cols, mask=cols < DIM, other=0.0).to(tl.float32)


@triton.jit
def stream_piece(row, i: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """As `load_piece`, for values read once: they bypass L1, which then keeps the tables."""
    cols = i * BLOCK + tl.arange(0, BLOCK)
    if (i + 1) * BLOCK <= DIM:
        return tl.load(row + cols, cache_modifier=".cg").to(tl.float32)
    return tl.load(row + cols, mask=cols < DIM, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def store_piece(row, values, i: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    cols = i * BLOCK + tl.arange(0, BLOCK)
    if (i + 1) * BLOCK <= DIM:
        tl.store(row + cols, values.to(row.dtype.element_ty))
    else:
        tl.store(row + cols, values.to(row.dtype.element_ty), mask=cols < DIM)


@triton.jit
def centered_piece(values, mean, i: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """values - mean, zero beyond the end of the row."""
    if (i + 1) * BLOCK <= DIM:
        return values - mean
    return tl.where(i * BLOCK + tl.arange(0, BLOCK) < DIM, values - mean, 0.0)


@triton.jit
def normalize(values, eps, DIM: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """Layer norm without affine of a row (tuple of pieces) -> (tuple of pieces, 1 / standard deviation)."""
    total = values[0]
    for i in tl.static_range(1, PIECES):
        total += values[i]
    mean = tl.sum(total, 0) / DIM
    centered = tl.tuple(())
    square = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(PIECES):
        part = centered_piece(values[i], mean, i, DIM, BLOCK)
        square += part * part
        centered += (part,)
    rstd = 1.0 / tl.sqrt(tl.sum(square, 0) / DIM + eps)
    normed = tl.tuple(())
    for i in tl.static_range(PIECES):
        normed += (centered[i] * rstd,)
    return normed, rstd


@triton.jit
def store_fp8(row, descale, values, DIM: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """Write a row (tuple of pieces) as e4m3 with its scale, as `quantize_rows` defines them.

    Bits of |x| order like |x|, with NaN above all: an integer maximum does not lose a NaN.
    """
    highest = values[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for i in tl.static_range(1, PIECES):
        highest = tl.maximum(highest, values[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    amax = tl.max(highest, 0).to(tl.float32, bitcast=True)
    amax = tl.maximum(amax, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    one = tl.full([], 1.0, tl.float32)
    scale = tl.div_rn(one, amax) * 448.0  # two roundings, as PyTorch divides a number by a tensor
    for i in tl.static_range(PIECES):
        store_piece(row, values[i] * scale, i, DIM, BLOCK)
    tl.store(descale, tl.div_rn(one, scale))
