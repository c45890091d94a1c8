"""Values in e4m3 in one launch, to be measured against the two of `fp8_values`, whose formula and layout it keeps.

A program holds a few channels of a head for all rows of a slot in registers between their maxima and the use of these:
v is read once, whatever the L2 cache holds. The price is registers: 25 tiles of 128 x 16 take 242 of a thread's 255, so
that one program of 8 warps fills a multiprocessor, and a longer slot does not fit.
Shapes, dtypes and values that are not finite as in `fp8_values`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .fp8_values import ROWS, scales, slot_of
from .qk_rows import Slots


@triton.jit
def _once(
    v_ptr,
    v8_ptr,
    descale_ptr,
    write_ptr,
    strides,
    tokens,
    heads,
    slot_rows,
    slot_stride,
    slot_count,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    groups: tl.constexpr = D // CHANNELS  # neighbouring programs share the lines that they read
    index = tl.program_id(0) // groups
    batch, head = (index // heads).to(tl.int64), index % heads
    rows, dims = tl.arange(0, BLOCK), tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)
    tile = v_ptr + batch * strides[0] + head * strides[2] + rows[:, None].to(tl.int64) * strides[1] + dims[None, :]
    values = tl.tuple(())
    highest = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for i in tl.static_range(TILES):
        v = tl.load(tile, mask=(i * BLOCK + rows < tokens)[:, None], other=0.0)
        highest = tl.maximum(highest, tl.abs(v.to(tl.float32)))
        values += (v,)
        tile += BLOCK * strides[1]
    descale, scale = scales(tl.max(highest, 0))  # [CHANNELS]
    slot = slot_of(write_ptr, slot_rows)
    inside = (slot >= 0) & (slot < slot_count)
    length = (slot_count * slot_stride).to(tl.int64)  # rows of the buffer
    target = v8_ptr + ((batch * heads + head) * D + dims[:, None]) * length + rows[None, :]
    target += tl.cast(slot, tl.int64) * slot_stride
    for i in tl.static_range(TILES):
        v8 = (values[i].to(tl.float32) * scale[None, :]).to(tl.float8e4nv)
        tl.store(target + i * BLOCK, tl.trans(v8), mask=inside)  # padding rows get zeros
    tl.store(descale_ptr + ((batch * slot_count + slot) * heads + head) * D + dims, descale, mask=inside)


def store_values_once(
    v: Tensor, v8: Tensor, descale: Tensor, slots: Slots, write: Tensor | None = None, channels: int = 16
) -> None:
    """As `fp8_values.store_values_fp8`; `channels` of a head a program."""
    batch, tokens, heads, head_dim = v.shape
    _once[(batch * heads * (head_dim // channels),)](
        v,
        v8,
        descale,
        write,
        v.stride()[:3],
        tokens,
        heads,
        slots.rows,
        slots.stride,
        slots.count,
        D=head_dim,
        CHANNELS=channels,
        BLOCK=ROWS,
        TILES=slots.stride // ROWS,
        num_warps=max(ROWS * channels // 256, 1),  # eight neighbouring values, 16 bytes, a thread
    )
