"""The Triton kernel of everything that happens to a row of heads between a projection and the attention: full-width
RMS norm, rotation, quantisation, and the write to its place in a ring.

One program handles one token of one tensor ("part"): a row of H heads of d channels, held in registers from the load to
the store. Queries, keys and values of a token are parts of one launch. Memory-bound: each row is read and written once.

A ring is made of slots of `slot_rows` rows that lie `slot_stride` rows apart (equal unless slots are padded). Row
`write` + t is where token t goes; `write` lies on the device. A token that would fall outside the ring is not written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8_MAX = tl.constexpr(448.0)
HEAD_DIMS = (16, 32, 64, 128)
NUM_WARPS = 8


@triton.jit
def rotate_pairs(x, rope, inside, INVERSE: tl.constexpr, D: tl.constexpr):
    """x [R, D] float32, its interleaved pairs turned by a table, or by its transpose (the gradient) with INVERSE.

    `rope` [R or 1, D] points at (cos, sin) of each pair; rows that are not `inside` [R or 1, 1] stay.
    """
    HALF: tl.constexpr = D // 2
    cos, sin = tl.split(tl.reshape(tl.load(rope, mask=inside, other=0.0), (rope.shape[0], HALF, 2)))
    if INVERSE:
        sin = -sin
    re, im = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    turned = tl.reshape(tl.join(re * cos - im * sin, re * sin + im * cos), (x.shape[0], D))
    return tl.where(inside, turned, x)


@triton.jit
def _rows_kernel(
    sources,
    weights,
    ropes,
    scales,
    targets,
    writes,
    source_strides,
    target_strides,
    tokens,
    rope_rows,
    rope_stride,
    slot_rows,
    slot_stride,
    ring_rows,
    eps,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = tl.program_id(0) % tokens
    heads = tl.arange(0, BLOCK_H)[:, None]
    place = heads * D + tl.arange(0, D)[None, :]  # [H, d]
    held = heads < HEADS
    for i in tl.static_range(len(sources)):
        if tl.program_id(1) == i:
            source = sources[i] + batch * source_strides[2 * i] + token.to(tl.int64) * source_strides[2 * i + 1]
            x = tl.load(source + place, mask=held, other=0.0)
            y = x.to(tl.float32)
            if weights[i] is not None:
                weight = tl.load(weights[i] + place, mask=held, other=0.0)
                unit = y * tl.rsqrt(tl.sum(y * y) / (HEADS * D) + eps)
                y = unit.to(x.dtype).to(tl.float32) * weight.to(tl.float32)
                if weight.dtype == x.dtype:  # else the product is float32, as torch promotes it
                    y = y.to(x.dtype).to(tl.float32)
            if ropes[i] is not None:
                row = ropes[i] + batch * rope_stride + token.to(tl.int64) * D
                y = rotate_pairs(y, row + tl.arange(0, D)[None, :], token < rope_rows, INVERSE, D)
            if scales[i] is not None:
                y = y * tl.load(scales[i] + heads, mask=held, other=0.0)
                y = tl.clamp(y, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
            target_row = token
            wanted = held
            if writes[i] is not None:
                row_in_ring = tl.load(writes[i]).to(tl.int32) + token
                target_row = row_in_ring // slot_rows * slot_stride + row_in_ring % slot_rows
                wanted = held & (row_in_ring >= 0) & (row_in_ring < ring_rows)
            target = targets[i] + batch * target_strides[2 * i] + target_row.to(tl.int64) * target_strides[2 * i + 1]
            tl.store(target + place, y.to(targets[i].dtype.element_ty), mask=wanted)


@dataclass(frozen=True)
class Part:
    """One tensor of a launch. source [B, L, H * d] or [B, L, H, d]; target [B, S, H, d], whose heads lie side by side.

    `weight` [H * d]: norm the row first. `rotate`: apply the launch's table. `scale` float32 [H]: multiply and saturate
    to e4m3 (target float8_e4m3fn). `write` one integer on the device: the target is a ring, else S = L.
    """

    source: Tensor
    target: Tensor
    weight: Tensor | None = None
    rotate: bool = False
    scale: Tensor | None = None
    write: Tensor | None = None


@dataclass(frozen=True)
class Slots:
    """How the rows of a ring lie: `count` slots of `rows` rows, `stride` rows from one to the next."""

    count: int
    rows: int
    stride: int

    @property
    def capacity(self) -> int:
        """Rows that can be valid."""
        return self.count * self.rows

    @property
    def length(self) -> int:
        """Rows of the buffer, padding included."""
        return self.count * self.stride


def prepare_rows(
    parts: Sequence[Part],
    num_heads: int,
    rope: Tensor | None = None,
    eps: float = 1e-6,
    slots: Slots | None = None,
    inverse: bool = False,
) -> None:
    """Launch the kernel over all parts; `rope` [(B,) L', d/2, 2] float32 or None, `inverse` turns the other way."""
    batch, tokens = parts[0].source.shape[:2]
    if batch * tokens == 0:
        return
    sources = [_rows(part.source) for part in parts]
    head_dim = sources[0].shape[-1] // num_heads
    table = None if rope is None else _table(rope)
    if table is not None and table.shape[-3] == 0:
        table = None
    slots = slots or Slots(1, tokens, tokens)
    _rows_kernel[(batch * tokens, len(parts))](
        tuple(sources),
        tuple(None if part.weight is None else part.weight.contiguous() for part in parts),
        tuple(table if part.rotate else None for part in parts),
        tuple(part.scale for part in parts),
        tuple(part.target for part in parts),
        tuple(part.write for part in parts),
        tuple(stride for source in sources for stride in source.stride()[:2]),
        tuple(stride for part in parts for stride in part.target.stride()[:2]),
        tokens,
        0 if table is None else table.shape[-3],
        0 if table is None or table.dim() == 3 or table.shape[0] == 1 else table.stride(0),
        slots.rows,
        slots.stride,
        slots.capacity,
        eps,
        INVERSE=inverse,
        HEADS=num_heads,
        BLOCK_H=triton.next_power_of_2(num_heads),
        D=head_dim,
        num_warps=NUM_WARPS,
    )


def _rows(x: Tensor) -> Tensor:
    """[B, L, H, d] or [B, L, H * d] as rows whose channels lie side by side, without a copy where they do."""
    x = x.flatten(2)
    return x if x.stride(2) == 1 else x.contiguous()


def _table(rope: Tensor) -> Tensor:
    """The rotary table with dense rows; an expanded batch stays expanded."""
    dense = rope.stride()[-3:] == (rope.shape[-2] * 2, 2, 1)
    return rope if dense and rope.dtype == torch.float32 else rope.float().contiguous()
