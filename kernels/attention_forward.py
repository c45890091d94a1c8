"""Flash attention over several key segments: the Triton forward kernel and its launch.

One program holds BLOCK_M queries of one head and runs over the keys of each segment in turn, with an online softmax in
base 2 (Dao, "FlashAttention-2", 2023). Full key tiles go through a loop without masks; the last partial tile of a
segment has one of its own, so that a length that is only known on the device costs nothing in the loop.

Legend: M queries of a tile, N keys of a tile, d head size. Scores are q . k / sqrt(d); the kernel keeps them times
log2(e), so that exp2 serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched
from .qk_rows import rotate_pairs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch settings of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def online_softmax(scores, scale, bias, top, total):
    """Scores [M, N] before scaling -> weights exp2(scale * s - max + bias) [M, N], and the running maximum, their sum
    and the decay of what was summed before."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    # a row that has seen no key keeps -inf as its maximum, which must not meet another -inf
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale - (base - bias)[:, None])
    decay = tl.exp2(top - base)
    return weights, new_top, total * decay + tl.sum(weights, 1), decay


@triton.jit
def _attend(
    acc,
    top,
    total,
    q,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    rope_ptr,
    rope_rows,
    mask_ptr,
    mask_rows,
    begin,
    end,
    length,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Key tiles from `begin` to `end` of one segment and head; with TAIL, keys from `length` on do not count."""
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D)
    for n in tl.range(begin, end, BLOCK_N):
        first = tl.cast(n, tl.int64)
        k_tile = k_ptr + first * k_stride + cols[:, None] * k_stride + dims[None, :]  # [N, d]
        v_tile = v_ptr + first * v_stride + cols[:, None] * v_stride + dims[None, :]  # [N, d]
        if TAIL:
            valid = n + cols < length
            k = tl.load(k_tile, mask=valid[:, None], other=0.0)
            v = tl.load(v_tile, mask=valid[:, None], other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        v = v.to(v_ptr.dtype.element_ty)
        if rope_ptr is not None:
            turn = rope_ptr + first * D + cols[:, None] * D + dims[None, :]
            k = rotate_pairs(k.to(tl.float32), turn, (n + cols < rope_rows)[:, None], False, D)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)  # [M, N]
        if mask_ptr is not None:
            seen = tl.load(
                mask_ptr + mask_rows[:, None] + n + cols[None, :], mask=(n + cols < length)[None, :], other=0
            )
            scores = tl.where(seen != 0, scores, float("-inf"))
        elif TAIL:
            scores = tl.where(valid[None, :], scores, float("-inf"))
        weights, top, total, decay = online_softmax(scores, scale, 0.0, top, total)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _forward_kernel(
    q_ptr,
    keys,
    values,
    lengths,
    ropes,
    mask_ptr,
    out_ptr,
    lse_ptr,
    rows,
    rope_rows,
    strides,
    q_strides,
    queries,
    heads,
    mask_stride,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    present = tokens < queries
    q_tile = q_ptr + batch * q_strides[0] + head * q_strides[2] + tokens[:, None].to(tl.int64) * q_strides[1]
    q = tl.load(q_tile + dims[None, :], mask=present[:, None], other=0.0)
    q = q.to(values[0].dtype.element_ty)

    acc = tl.zeros((BLOCK_M, D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mask_rows = tl.minimum(tokens, queries - 1).to(tl.int64) * mask_stride
    column = 0  # of the mask, where this segment starts
    for i in tl.static_range(len(keys)):
        length = rows[i]
        if lengths[i] is not None:
            length = tl.minimum(tl.load(lengths[i]).to(tl.int32), length)
        k_ptr = keys[i] + batch * strides[6 * i] + head * strides[6 * i + 2]
        v_ptr = values[i] + batch * strides[6 * i + 3] + head * strides[6 * i + 5]
        rope_ptr = ropes[i]
        if rope_ptr is not None:
            rope_ptr += batch * rope_rows[2 * i + 1]
        segment_mask = mask_ptr
        if mask_ptr is not None:
            segment_mask += column
        full = length // BLOCK_N * BLOCK_N
        acc, top, total = _attend(
            acc, top, total, q, k_ptr, v_ptr, strides[6 * i + 1], strides[6 * i + 4], rope_ptr, rope_rows[2 * i],
            segment_mask, mask_rows, 0, full, length, scale, D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, q, k_ptr, v_ptr, strides[6 * i + 1], strides[6 * i + 4], rope_ptr, rope_rows[2 * i],
            segment_mask, mask_rows, full, length, length, scale, D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        column += rows[i]

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a query without keys gives zero
    out_tile = out_ptr + ((batch * queries + tokens[:, None]) * heads + head) * D + dims[None, :]
    tl.store(out_tile, out.to(values[0].dtype.element_ty).to(out_ptr.dtype.element_ty), mask=present[:, None])
    lse = (top + tl.log2(total)) * LN2
    tl.store(lse_ptr + (batch * heads + head) * queries + tokens, lse, mask=present)


def choose_tiles(dtype: torch.dtype, head_dim: int, keys: int, on_load: bool = False) -> Tiles:
    """Tiles for Hopper; few keys (the audio tokens of a frame) take the smallest key tile that holds them."""
    if keys <= 32:
        return Tiles(64, 32, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 1)
    if head_dim < 64:
        return Tiles(128, 64, 4, 3)
    return Tiles(128, 128, 8, 2 if on_load else 3)  # the table of a rotation on load takes the third stage's memory


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: three tf32 products stand for one in float32; half precision is exact either way."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def forward(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention [B, Lq, H, d] in the dtype of q, and the natural log-sum-exp of the scores, float32 [B, H, Lq].

    Arguments as in `rope_attention`, except that `lengths` are one-element integer tensors on the device, or None. The
    channels of a head must lie side by side.
    """
    batch, queries, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q = dense(q)
    keys, values = [dense(k) for k in keys], [dense(v) for v in values]
    tables = [None if r is None else r.float().contiguous() for r in ropes]
    on_load = any(table is not None for table in tables)
    tiles = tiles or choose_tiles(values[0].dtype, head_dim, sum(k.shape[1] for k in keys), on_load)
    launched(_forward_kernel)[(triton.cdiv(queries, tiles.block_m), batch * heads)](
        q,
        tuple(keys),
        tuple(values),
        tuple(lengths),
        tuple(tables),
        None if mask is None else mask.contiguous().view(torch.uint8),
        out,
        lse,
        tuple(k.shape[1] for k in keys),
        tuple(n for table in tables for n in _table_shape(table)),
        tuple(n for k, v in zip(keys, values, strict=True) for n in (*k.stride()[:3], *v.stride()[:3])),
        q.stride()[:3],
        queries,
        heads,
        0 if mask is None else mask.shape[1],
        head_dim**-0.5 * LOG2E.value,
        D=head_dim,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        PRECISION=precision(values[0].dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out, lse


def dense(x: Tensor) -> Tensor:
    """x [B, L, H, d] with the channels of a head side by side; a copy only where they are not."""
    return x if x.stride(3) == 1 else x.contiguous()


def _table_shape(table: Tensor | None) -> tuple[int, int]:
    """Rows of a rotary table [(B,) L', d/2, 2], and elements from one sample to the next."""
    if table is None:
        return 0, 0
    return table.shape[-3], table.stride(0) if table.dim() == 4 and table.shape[0] > 1 else 0
