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

from .dispatch import interpreting

INTERPRETED = tl.constexpr(interpreting())
"""Whether Triton's interpreter runs these kernels, which has no PTX: settled, as Triton does it, when they are read."""
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
    if tl.bfloat16 == DTYPE and not INTERPRETED:
        return _rounded_pairs(x)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _rounded_pairs(x):
    """To bfloat16 two values an instruction: single ones go through the unit of exp and division, a quarter as fast."""
    pairs = tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
    )
    return pairs.to(tl.float32)


@triton.jit
def gelu_tanh(x):
    """GELU (tanh form), 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    On a GPU with the hardware's tanh, within 2^-11 of it: one slow instruction in place of an exponential and a
    division.
    """
    if INTERPRETED:
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    half = 0.5 * x
    inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    turned = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
    )
    return half + half * turned


@triton.jit
def load_piece(row, i: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Piece i of a table row that many programs read; float32, zeros beyond the end."""
    cols = i * BLOCK + tl.arange(0, BLOCK)
    if (i + 1) * BLOCK <= DIM:
        return tl.load(row + cols).to(tl.float32)
    return tl.load(row + cols, mask=cols < DIM, other=0.0).to(tl.float32)


@triton.jit
def stream_piece(row, i: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """As `load_piece`, for values read once: they leave L1 to the tables.

    Half precision bypasses it. A thread reads its eight float32 in two instructions, each half of every sector, and
    would fetch all sectors twice: they stay until the second, and go first.
    """
    cols = i * BLOCK + tl.arange(0, BLOCK)
    wide: tl.constexpr = row.dtype.element_ty.primitive_bitwidth == 32
    modifier: tl.constexpr = "" if wide else ".cg"
    policy: tl.constexpr = "evict_first" if wide else ""
    if (i + 1) * BLOCK <= DIM:
        return tl.load(row + cols, cache_modifier=modifier, eviction_policy=policy).to(tl.float32)
    return tl.load(row + cols, mask=cols < DIM, other=0.0, cache_modifier=modifier, eviction_policy=policy).to(
        tl.float32
    )


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
