"""The Triton kernel of everything that happens to a row of heads between a projection and the attention: full-width
RMS norm, rotation, quantisation, and the write to its place in a ring.

One program handles one token of one tensor ("part"): a row of H heads of d channels, held in registers from the load to
the store as a tuple of PIECES blocks [HEADS_A_PIECE, d] (see `rows`: 40 heads are five pieces of eight, not 64 padded
ones). Queries, keys and values of a token are parts of one launch. Memory-bound: each row is read and written once; all
loads of a program start before its sum of squares waits for them.

A thread holds eight neighbouring channels, at the same place of a head in every piece: the pairs of the rotation lie in
one thread, and the table of a token is read once for all its heads.

A ring is made of slots of `slot_rows` rows that lie `slot_stride` rows apart (equal unless slots are padded). Row
`write` + t is where token t goes; `write` lies on the device. A token that would fall outside the ring is not written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched
from .rows import Tile, rounded, row_major, tile

FP8_MAX = tl.constexpr(448.0)
HEAD_DIMS = (16, 32, 64, 128)


@triton.jit
def load_turn(rope, inside, INVERSE: tl.constexpr):
    """cos, sin [R, D / 2] of a table at `rope` [R, D]; zeros where not `inside` [R, 1]. INVERSE: its transpose."""
    HALF: tl.constexpr = rope.shape[1] // 2
    table = tl.load(rope, mask=inside, other=0.0)
    cos, sin = tl.split(tl.reshape(table, (rope.shape[0], HALF, 2)))
    if INVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def turn_pairs(x, cos, sin, inside):
    """x [R, D] float32, its interleaved pairs turned by cos, sin [R or 1, D / 2] where `inside` [R or 1, 1]."""
    HALF: tl.constexpr = x.shape[1] // 2
    re, im = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    turned = tl.reshape(tl.join(re * cos - im * sin, re * sin + im * cos), (x.shape[0], 2 * HALF))
    return tl.where(inside, turned, x)


@triton.jit
def rotate_pairs(x, rope, inside, INVERSE: tl.constexpr, D: tl.constexpr):
    """x [R, D] float32 turned by the table at `rope` [R or 1, D], or by its transpose (the gradient) with INVERSE.

    The table holds (cos, sin) of each pair; rows that are not `inside` [R or 1, 1] stay.
    """
    cos, sin = load_turn(rope, inside, INVERSE)
    return turn_pairs(x, cos, sin, inside)


@triton.jit
def _load_heads(row, i: tl.constexpr, STREAM: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Piece i of a row, [R, D] in its own dtype, zeros beyond the last head. STREAM: read once, so past L1."""
    CACHE: tl.constexpr = ".cg" if STREAM else ""
    heads = i * R + tl.arange(0, R)[:, None]
    place = heads * D + tl.arange(0, D)[None, :]
    if (i + 1) * R <= HEADS:
        return tl.load(row + place, cache_modifier=CACHE)
    return tl.load(row + place, mask=heads < HEADS, other=0.0, cache_modifier=CACHE)


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
    HEADS_A_PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    D: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = tl.program_id(0) % tokens
    for i in tl.static_range(len(sources)):
        if tl.program_id(1) == i:
            source = sources[i] + batch * source_strides[2 * i] + token.to(tl.int64) * source_strides[2 * i + 1]
            values = tl.tuple(())
            for j in tl.static_range(PIECES):
                values += (_load_heads(source, j, True, HEADS, HEADS_A_PIECE, D),)
            factors = tl.tuple(())
            if weights[i] is not None:
                for j in tl.static_range(PIECES):
                    factors += (_load_heads(weights[i], j, False, HEADS, HEADS_A_PIECE, D),)
            if ropes[i] is not None:
                turns = token < rope_rows
                row = ropes[i] + batch * rope_stride + token.to(tl.int64) * D
                # once for every head of a piece: each thread reads the entries of its own channels, in its own layout
                table = row + tl.broadcast_to(tl.arange(0, D)[None, :], (HEADS_A_PIECE, D))
                cos, sin = load_turn(table, turns, INVERSE)  # [HEADS_A_PIECE, d / 2]
            target_row = token
            wanted = True
            if writes[i] is not None:
                row_in_ring = tl.load(writes[i]).to(tl.int32) + token
                target_row = row_in_ring // slot_rows * slot_stride + row_in_ring % slot_rows
                wanted = (row_in_ring >= 0) & (row_in_ring < ring_rows)
            target = targets[i] + batch * target_strides[2 * i] + target_row.to(tl.int64) * target_strides[2 * i + 1]

            if weights[i] is not None:
                squares = tl.zeros([HEADS_A_PIECE, D], tl.float32)
                for j in tl.static_range(PIECES):
                    y = values[j].to(tl.float32)
                    squares += y * y
                rstd = tl.rsqrt(tl.sum(squares) / (HEADS * D) + eps)
            for j in tl.static_range(PIECES):
                heads = j * HEADS_A_PIECE + tl.arange(0, HEADS_A_PIECE)[:, None]
                y = values[j].to(tl.float32)
                if weights[i] is not None:
                    y = rounded(y * rstd, values[j].dtype) * factors[j].to(tl.float32)
                    if factors[j].dtype == values[j].dtype:  # else the product is float32, as torch promotes it
                        y = rounded(y, values[j].dtype)
                if ropes[i] is not None:
                    y = turn_pairs(y, cos, sin, turns)
                if scales[i] is not None:
                    y = y * tl.load(scales[i] + heads, mask=heads < HEADS, other=0.0)
                    y = tl.clamp(y, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
                place = target + heads * D + tl.arange(0, D)[None, :]
                tl.store(place, y.to(targets[i].dtype.element_ty), mask=(heads < HEADS) & wanted)


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
    tiling: Tile | None = None,
) -> None:
    """Launch the kernel over all parts; `rope` [(B,) L', d/2, 2] float32 or None, `inverse` turns the other way.

    `tiling` (else `rows.tile`): channels of a piece, a power of two and whole heads, and warps of a program.
    """
    batch, tokens = parts[0].source.shape[:2]
    if batch * tokens == 0:
        return
    sources = [_rows(part.source) for part in parts]
    head_dim = sources[0].shape[-1] // num_heads
    table = None if rope is None else _table(rope)
    if table is not None and table.shape[-3] == 0:
        table = None
    slots = slots or Slots(1, tokens, tokens)
    tiling = tiling or tile(num_heads * head_dim)
    launched(_rows_kernel)[(batch * tokens, len(parts))](
        tuple(sources),
        tuple(None if part.weight is None else part.weight.contiguous() for part in parts),
        tuple(table if part.rotate else None for part in parts),
        tuple(None if part.scale is None else part.scale.contiguous() for part in parts),
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
        HEADS_A_PIECE=tiling.block // head_dim,
        PIECES=tiling.pieces(num_heads * head_dim),
        D=head_dim,
        num_warps=tiling.num_warps,
    )


def _rows(x: Tensor) -> Tensor:
    """[B, L, H, d] or [B, L, H * d] as rows whose channels lie side by side, without a copy where they do."""
    return row_major(x.flatten(2))


def _table(rope: Tensor) -> Tensor:
    """The rotary table with dense rows; an expanded batch stays expanded."""
    dense = rope.stride()[-3:] == (rope.shape[-2] * 2, 2, 1)
    return rope if dense and rope.dtype == torch.float32 else rope.float().contiguous()
