"""Values in e4m3 for FP8 attention: transposed, with one scale a slot of the ring, head and channel.

    amax[b, h, c] = max(amax of the slot's rows, 1e-12);  descale[b, slot, h, c] = amax / 448
    v8[b, h, c, row] = e4m3(v * (448 / amax))

A block fills one whole slot, so its scales are its own and nothing stored before is touched. Two launches: partial
maxima, then maxima, scaling and transposition; both deterministic. The second goes through the rows backwards, so that
it begins with what the first left in the L2 cache: of LiveAvatar 14B's 32 MB nearly all, and what reaches memory is one
reading of v and one writing of v8.

Shapes: v [B, L, H, d] (rows may be strided), L the rows of a slot; v8 [B, H, d, S] e4m3; descale float32
[B, slots, H, d]; `write` int32 [1] on the device, the valid row where the block begins, a multiple of L, or None for
the first slot.
Non-finite values: a NaN stays in its channel of its row, an Inf makes its channel of the slot NaN.
Errors: ValueError when the block is not one slot long, or the buffers do not fit or are not dense.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import Case, Op, randn
from .dispatch import triton_runs
from .kv_cache import E4M3
from .qk_rows import FP8_MAX, Slots

AMAX_FLOOR = tl.constexpr(1e-12)
ROWS = 128  # rows of a tile; the stride of a slot is a multiple of it


@triton.jit
def slot_of(write_ptr, slot_rows):
    """The slot where the block goes."""
    slot = 0
    if write_ptr is not None:  # not an early return: Triton 3.6 compiles what follows one all the same
        slot = tl.load(write_ptr).to(tl.int32) // slot_rows
    return slot


@triton.jit
def scales(amax):
    """(what restores values of this amax, what they are multiplied by)."""
    amax = tl.maximum(amax, AMAX_FLOOR)
    one = tl.full(amax.shape, 1.0, tl.float32)
    # the second rounds twice, as PyTorch divides a number by a tensor
    return tl.div_rn(amax, one * FP8_MAX), tl.div_rn(one, amax) * FP8_MAX


@triton.jit
def _amax_kernel(v_ptr, partial_ptr, strides, tokens, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    """Maxima of |v| over a tile of rows, [B, tiles, H, d]."""
    # neighbouring programs read neighbouring heads of the same rows
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    rows, dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    tile = v_ptr + batch * strides[0] + head * strides[2] + rows[:, None].to(tl.int64) * strides[1] + dims[None, :]
    v = tl.load(tile, mask=(rows < tokens)[:, None], other=0.0).to(tl.float32)
    place = ((batch * tl.num_programs(1) + tl.program_id(1)) * heads + head) * D + dims
    tl.store(partial_ptr + place, tl.max(tl.abs(v), 0))


@triton.jit
def _store_kernel(
    v_ptr,
    partial_ptr,
    v8_ptr,
    descale_ptr,
    write_ptr,
    strides,
    tokens,
    heads,
    tiles,
    slot_rows,
    slot_stride,
    slot_count,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    part = tl.num_programs(1) - 1 - tl.program_id(1)  # the rows that were read last come first
    rows, dims, parts = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, TILES)
    tile = v_ptr + batch * strides[0] + head * strides[2] + rows[:, None].to(tl.int64) * strides[1] + dims[None, :]
    v = tl.load(tile, mask=(rows < tokens)[:, None], other=0.0, eviction_policy="evict_first")
    slot = slot_of(write_ptr, slot_rows)
    partial = partial_ptr + ((batch * tiles + parts[:, None]) * heads + head) * D + dims[None, :]
    amax = tl.max(tl.load(partial, mask=(parts < tiles)[:, None], other=0.0), 0)  # [d]
    descale, scale = scales(amax)
    v8 = (v.to(tl.float32) * scale[None, :]).to(tl.float8e4nv)
    inside = (slot >= 0) & (slot < slot_count)
    length = (slot_count * slot_stride).to(tl.int64)  # rows of the buffer
    start = tl.cast(slot, tl.int64) * slot_stride + part * BLOCK
    target = v8_ptr + ((batch * heads + head) * D + dims[:, None]) * length + start + tl.arange(0, BLOCK)[None, :]
    # padding rows get zeros; what is written must not push out what is still to be read
    tl.store(target, tl.trans(v8), mask=inside, eviction_policy="evict_first")
    if part == 0:
        tl.store(descale_ptr + ((batch * slot_count + slot) * heads + head) * D + dims, descale, mask=inside)


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """v [B, L, H, d], one slot -> (e4m3 [B, H, d, L], descale float32 [B, H, d])."""
    limit = float(FP8_MAX.value)
    amax = v.float().abs().amax(1).clamp(min=AMAX_FLOOR.value)
    v8 = (v.float() * (limit / amax)[:, None]).clamp(-limit, limit).to(E4M3)
    return v8.permute(0, 2, 3, 1), amax / limit


def reference(v: Tensor, v8: Tensor, descale: Tensor, slots: Slots, write: Tensor | None = None) -> None:
    slot = 0 if write is None else int(write) // slots.rows
    if 0 <= slot < slots.count:
        start = slot * slots.stride
        v8[..., start : start + slots.stride] = 0
        v8[..., start : start + slots.rows], descale[:, slot] = quantize_values(v)


def store_values_fp8(v: Tensor, v8: Tensor, descale: Tensor, slots: Slots, write: Tensor | None = None) -> None:
    """Quantise and transpose one block into its slot; see the module docstring."""
    batch, tokens, heads, head_dim = v.shape
    if tokens != slots.rows or slots.stride % ROWS:
        raise ValueError(f"{tokens} rows of values do not fill a slot of {slots}; its stride is a multiple of {ROWS}")
    if v8.shape != (batch, heads, head_dim, slots.length) or descale.shape != (batch, slots.count, heads, head_dim):
        raise ValueError(
            f"values {tuple(v.shape)} in {slots} need e4m3 [{batch}, {heads}, {head_dim}, {slots.length}] and descale "
            f"[{batch}, {slots.count}, {heads}, {head_dim}], not {tuple(v8.shape)} and {tuple(descale.shape)}"
        )
    if not (v8.is_contiguous() and descale.is_contiguous()):
        raise ValueError(
            f"v8 has strides {v8.stride()}, descale {descale.stride()}; both must be dense, and so no part of a "
            "larger buffer"
        )
    torch.ops.kinora.store_values_fp8(v, v8, descale, write, [slots.count, slots.rows, slots.stride])


@torch.library.custom_op("kinora::store_values_fp8", mutates_args=("v8", "descale"))
def _store_values_fp8_op(v: Tensor, v8: Tensor, descale: Tensor, write: Tensor | None, slots: list[int]) -> None:
    layout = Slots(*slots)
    if not triton_runs(v, v8, descale, write):
        reference(v, v8, descale, layout, write)
        return
    launch(v, v8, descale, write, layout)


def launch(
    v: Tensor, v8: Tensor, descale: Tensor, write: Tensor | None, layout: Slots, block: int = ROWS, num_warps: int = 4
) -> None:
    """Both kernels, on tiles of `block` rows of a head."""
    batch, tokens, heads, head_dim = v.shape
    v = v if v.stride(3) == 1 else v.contiguous()
    tiles = layout.stride // block
    partial = torch.empty((batch, tiles, heads, head_dim), dtype=torch.float32, device=v.device)
    grid, strides = (batch * heads, tiles), v.stride()[:3]
    _amax_kernel[grid](v, partial, strides, tokens, heads, D=head_dim, BLOCK=block, num_warps=num_warps)
    _store_kernel[grid](
        v,
        partial,
        v8,
        descale,
        write,
        strides,
        tokens,
        heads,
        tiles,
        layout.rows,
        layout.stride,
        layout.count,
        D=head_dim,
        BLOCK=block,
        TILES=triton.next_power_of_2(tiles),
        num_warps=num_warps,
    )


_store_values_fp8_op.register_fake(lambda *_: None)


def _case(name: str, slots: Slots, write: int, heads: int, head_dim: int, batch: int = 1, small: bool = True) -> Case:
    dtype = torch.float32 if small else torch.bfloat16

    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return randn(*shape, device=device, generator=generator, dtype=dtype)

        qkv = draw(batch, slots.rows, 3, heads, head_dim, dtype=dtype)  # values lie in the projection's rows
        return {
            "v": qkv[:, :, 2],
            "v8": draw(batch, heads, head_dim, slots.length).to(E4M3),
            "descale": draw(batch, slots.count, heads, head_dim),
            "slots": slots,
            "write": torch.tensor([write], dtype=torch.int32, device=device),
        }

    values = batch * slots.rows * heads * head_dim
    return Case(name, inputs, 0, 0 if small else values * (dtype.itemsize + 1), small)


def cases() -> list[Case]:
    """A streaming block of LiveAvatar 14B; slots with padding, the last one, one beyond the ring."""
    return [
        _case("liveavatar-14b", Slots(4, 3168, 3200), 2 * 3168, 40, 128, small=False),
        _case("a padded slot", Slots(2, 130, 256), 130, 3, 32, 2),
        _case("beyond the ring", Slots(2, 5, 128), 10, 2, 16),
    ]


OP = Op("store_values_fp8", store_values_fp8, reference, cases, mutates=("v8", "descale"), differentiable=False)
