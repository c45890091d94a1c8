"""Attention of tiles whose keys were divided among programs: the parts are put together (Triton).

Each part has an accumulator that is not yet divided by the sum of its weights, the maximum against which these were
taken (in base 2), and the sum: out = sum_i 2^(top_i - top) acc_i / sum_i 2^(top_i - top) total_i, top = max_i top_i.
"""

import triton
import triton.language as tl
from torch import Tensor

LN2 = tl.constexpr(0.6931471805599453)
ROWS = 16
"""Rows of a tile that one program takes."""


@triton.jit
def _merge_kernel(
    part_ptr,
    peak_ptr,
    out_ptr,
    lse_ptr,
    programs,
    rest,
    first_tile,
    q_tiles,
    queries,
    heads,
    TILE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    acc = tl.zeros((ROWS, D), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for p in range(tile * programs // rest, ((tile + 1) * programs - 1) // rest + 1):
        # a program's first part belongs to the tile in which its share begins
        row = (2 * p + tl.where(p * rest // programs == tile, 0, 1)) * TILE + rows
        peak = tl.load(peak_ptr + row * 2)
        new_top = tl.maximum(top, peak)
        weight, decay = tl.exp2(peak - new_top), tl.exp2(top - new_top)
        total = total * decay + tl.load(peak_ptr + row * 2 + 1) * weight
        acc = acc * decay[:, None] + tl.load(part_ptr + row[:, None] * D + dims[None, :]) * weight[:, None]
        top = new_top
    slab = (first_tile + tile) // q_tiles  # sample and head
    tokens = (first_tile + tile) % q_tiles * TILE + rows
    present = tokens < queries
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a query without keys gives zero
    start = ((slab // heads * queries + tokens).to(tl.int64) * heads + slab % heads) * D
    tl.store(out_ptr + start[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=present[:, None])
    if lse_ptr is not None:
        tl.store(lse_ptr + slab * queries + tokens, (top + tl.log2(total)) * LN2, mask=present)


def merge(part: Tensor, peak: Tensor, out: Tensor, lse: Tensor | None, tiles: int, rest: int) -> None:
    """Write the last `rest` of `tiles` query tiles into `out` [B, Lq, H, d] and `lse` [B, H, Lq], in place.

    `part` float32 [2 * programs, T, d] and `peak` float32 [2 * programs, T, 2] (maximum and sum): in units of one tile
    over the number of programs, program p did the keys from p * rest to (p + 1) * rest; part 2p is of the tile in which
    they begin, part 2p + 1 of the next one, if they reach it.
    """
    _, queries, heads, d = out.shape
    tile_rows = part.shape[1]
    _merge_kernel[(tile_rows // ROWS, rest)](
        part,
        peak,
        out,
        lse,
        part.shape[0] // 2,
        rest,
        tiles - rest,
        -(-queries // tile_rows),
        queries,
        heads,
        TILE=tile_rows,
        D=d,
        ROWS=ROWS,
    )
