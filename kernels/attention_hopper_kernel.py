"""Flash attention for Hopper in Gluon: one kernel for e4m3 and for 2-byte types, d = 128.

A persistent program runs on every multiprocessor and takes tiles of queries of one head. Its warps have two roles
(Shah et al., "FlashAttention-3", 2024): one warp loads queries, keys and values by TMA into shared memory, keys and
values into a ring of stages; the others, in warpgroups of 64 queries each, multiply. While one warpgroup computes its
softmax, the tensor cores work for another: three of them in e4m3; two in 2-byte types, whose operands take more
registers. Barriers are the only thing that the roles share. `attention_hopper_work` says who takes what.

e4m3: the columns of the scores follow the accumulator's order, not the operand's (see `to_operand`), so the descriptor
of the keys swaps the rows of every sixteen. Products of a key tile are added in float32, since Hopper's FP8 tensor
cores accumulate with fewer bits. Values have one scale a slot, head and channel: the accumulator is kept in units of
the slot being read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .attention_hopper_softmax import along, fold_max, fold_sum, mask_tile, to_operand
from .attention_hopper_work import KEYS, count_work, find_tile, find_work, segment_slots, slot_tiles

ROWS = gl.constexpr(64)
"""Queries of one warpgroup."""
LOWEST = gl.constexpr(-1e30)
"""The running maximum before the first key; finite, so that its difference to a masked score is one."""
LOG2_448 = gl.constexpr(8.807354922057604)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def ring(done, STAGES: gl.constexpr):
    """Stage, and the parity of the turn, of the stage that is number `done` in the program's order."""
    SHIFT: gl.constexpr = 1 if STAGES == 2 else 2
    return done & (STAGES - 1), (done >> SHIFT) & 1


@gluon.jit
def load_keys(desc, row, batch, head, seg_rows, bar, buffer):
    """`row` counts in the rows of the sample, `seg_rows`."""
    D: gl.constexpr = desc.block_shape[len(desc.block_shape) - 1]
    buffer = buffer._reinterpret(desc.dtype, desc.block_shape, desc.layout)
    if desc.dtype == gl.float8e4nv:
        tma.async_copy_global_to_shared(desc, [(batch * seg_rows + row) // 16, 0, 0, 0, head * D], bar, buffer)
    else:
        tma.async_copy_global_to_shared(desc, [batch, row, head * D], bar, buffer)


@gluon.jit
def load_values(desc, row, batch, head, heads, bar, buffer):
    buffer = buffer._reinterpret(desc.dtype, desc.block_shape, desc.layout)
    if desc.dtype == gl.float8e4nv:
        tma.async_copy_global_to_shared(desc, [(batch * heads + head) * desc.block_shape[0], row], bar, buffer)
    else:
        tma.async_copy_global_to_shared(desc, [batch, row, head * desc.block_shape[2]], bar, buffer)


@gluon.jit
def produce(loads, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp: queries of a tile, then its keys and values in the order in which they are used."""
    (
        q_desc, k_desc_0, v_desc_0, k_desc_1, v_desc_1, q_smem, k_smem, v_smem, q_bars, bars, slots_0, length_0,
        length_1, layout_0, layout_1, key_tiles, rounds, items, q_tiles, tiles, heads,
    ) = loads  # fmt: skip
    D: gl.constexpr = q_desc.block_shape[2]
    SIZE: gl.constexpr = q_desc.dtype.primitive_bitwidth // 8
    FP8: gl.constexpr = q_desc.dtype == gl.float8e4nv
    q_ready, q_free = q_bars
    ready, free = bars
    done = 0  # stages
    for item in range(items):
        tile, begin, end = find_work(item, rounds, tiles, key_tiles)
        batch, head = (tile // q_tiles) // heads, (tile // q_tiles) % heads
        for group in gl.static_range(GROUPS):
            mbarrier.wait(q_free.index(group), (item & 1) ^ 1)
            mbarrier.expect(q_ready.index(group), ROWS * D * SIZE)
            tma.async_copy_global_to_shared(
                q_desc, [batch, (tile % q_tiles * GROUPS + group) * ROWS, head * D], q_ready.index(group),
                q_smem.index(group)._reinterpret(q_desc.dtype, q_desc.block_shape, q_desc.layout),
            )  # fmt: skip
        slot, valid, _, left = find_tile(begin, slots_0, length_0, length_1, layout_0, layout_1)
        for _ in range(begin, end):
            stage, phase = ring(done, STAGES)
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), phase ^ 1)
            mbarrier.expect(bar, 2 * KEYS * D * SIZE)
            row = (left - 1) * KEYS if FP8 else valid - left * KEYS
            if k_desc_1 is None or slot < slots_0:
                row += slot * layout_0[2]
                load_keys(k_desc_0, row, batch, head, layout_0[0] * layout_0[2], bar, k_smem.index(stage))
                load_values(v_desc_0, row, batch, head, heads, bar, v_smem.index(stage))
            else:
                row += (slot - slots_0) * layout_1[2]
                load_keys(k_desc_1, row, batch, head, layout_1[0] * layout_1[2], bar, k_smem.index(stage))
                load_values(v_desc_1, row, batch, head, heads, bar, v_smem.index(stage))
            left -= 1
            if left == 0:
                slot += 1
                valid, left = slot_tiles(slot, slots_0, length_0, length_1, layout_0, layout_1)
            done += 1


@gluon.jit
def read_unit(units, slot, batch, head, channels, D: gl.constexpr):
    """Descales of the values of a slot, counted through both segments, in some channels."""
    descale_ptr_0, descale_ptr_1, slots_0, layout_0, layout_1, heads = units
    if descale_ptr_1 is None or slot < slots_0:
        row = ((batch * layout_0[0] + slot) * heads + head) * D
        unit = gl.load(descale_ptr_0 + row + channels)
    else:
        row = ((batch * layout_1[0] + slot - slots_0) * heads + head) * D
        unit = gl.load(descale_ptr_1 + row + channels)
    return unit


@gluon.jit
def consume(work, INDEX: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr):
    """One warpgroup: 64 queries of every tile. The accumulator is held in two halves of the channels."""
    (
        q_smem, k_smem, v_smem, q_bars, bars, qk_descale_ptr, descale_ptr_0, descale_ptr_1, out_ptr, lse_ptr, part_ptr,
        peak_ptr, slots_0, length_0, length_1, layout_0, layout_1, key_tiles, rounds, items, queries, q_tiles, tiles,
        heads, scale,
    ) = work  # fmt: skip
    q_ready, q_free = q_bars
    ready, free = bars
    units = (descale_ptr_0, descale_ptr_1, slots_0, layout_0, layout_1, heads)
    HALF: gl.constexpr = D // 2
    dtype: gl.constexpr = k_smem.dtype
    FP8: gl.constexpr = dtype == gl.float8e4nv
    K_WIDTH: gl.constexpr = 256 // dtype.primitive_bitwidth
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, K_WIDTH])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, K_WIDTH])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 32 // dtype.primitive_bitwidth)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    bias: gl.constexpr = LOG2_448 if FP8 else 0.0
    channels = gl.arange(0, HALF, gl.SliceLayout(0, O_LAYOUT))
    no_scores = gl.zeros((ROWS, KEYS), gl.float32, S_LAYOUT)
    nothing = gl.zeros((ROWS, HALF), gl.float32, O_LAYOUT)

    done = 0  # stages
    for item in range(items):
        tile, begin, end = find_work(item, rounds, tiles, key_tiles)
        batch, head = (tile // q_tiles) // heads, (tile // q_tiles) % heads
        tile_scale = scale
        if qk_descale_ptr is not None:
            tile_scale = scale * gl.load(qk_descale_ptr + head)
        top = gl.full((ROWS,), LOWEST, gl.float32, ROW_LAYOUT)
        total = gl.zeros_like(fold_sum(no_scores))  # [M, 8]: of a row, what each thread has seen
        acc_0, acc_1 = nothing, nothing
        slot, valid, count, left = find_tile(begin, slots_0, length_0, length_1, layout_0, layout_1)
        mbarrier.wait(q_ready.index(INDEX), item & 1)
        for i in range(begin, end):
            stage, phase = ring(done, STAGES)
            mbarrier.wait(ready.index(stage), phase)
            k = k_smem.index(stage).permute((1, 0))
            scores = warpgroup_mma(q_smem.index(INDEX), k, no_scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [scores])
            if left == count:
                scores = mask_tile(scores, valid, count, FP8)
                if FP8 and slot > 0 and i > begin:
                    old_0 = read_unit(units, slot - 1, batch, head, channels, D)
                    new_0 = read_unit(units, slot, batch, head, channels, D)
                    old_1 = read_unit(units, slot - 1, batch, head, HALF + channels, D)
                    new_1 = read_unit(units, slot, batch, head, HALF + channels, D)
                    acc_0 *= (old_0 / new_0)[None, :]
                    acc_1 *= (old_1 / new_1)[None, :]
            highest = gl.convert_layout(gl.max(fold_max(scores), 1), ROW_LAYOUT, assert_trivial=True)
            new_top = gl.maximum(top, highest * tile_scale)
            decay = gl.exp2(top - new_top)
            top = new_top
            weights = gl.exp2(scores * tile_scale - (top - bias)[:, None])
            total = total * along(decay, total) + fold_sum(weights)
            p = to_operand(weights.to(dtype), P_LAYOUT)
            v = v_smem.index(stage).permute((1, 0)) if FP8 else v_smem.index(stage)
            v_0, v_1 = v.slice(0, HALF, dim=1), v.slice(HALF, HALF, dim=1)
            if FP8:
                product_0 = warpgroup_mma(p, v_0, nothing, use_acc=False, is_async=True)
                product_1 = warpgroup_mma(p, v_1, nothing, use_acc=False, is_async=True)
                product_0 = warpgroup_mma_wait(1, [product_0])
                acc_0 = acc_0 * along(decay, acc_0) + product_0
                product_1 = warpgroup_mma_wait(0, [product_1])
                mbarrier.arrive(free.index(stage))
                acc_1 = acc_1 * along(decay, acc_1) + product_1
            else:
                acc_0 = warpgroup_mma(p, v_0, acc_0 * along(decay, acc_0), is_async=True)
                acc_1 = warpgroup_mma(p, v_1, acc_1 * along(decay, acc_1), is_async=True)
                acc_0, acc_1 = warpgroup_mma_wait(0, [acc_0, acc_1])
                mbarrier.arrive(free.index(stage))
            left -= 1
            if left == 0 and i + 1 < end:
                slot += 1
                valid, left = slot_tiles(slot, slots_0, length_0, length_1, layout_0, layout_1)
                count = left
            done += 1
        mbarrier.arrive(q_free.index(INDEX))

        if FP8:
            acc_0 *= read_unit(units, slot, batch, head, channels, D)[None, :]
            acc_1 *= read_unit(units, slot, batch, head, HALF + channels, D)[None, :]
        sums = gl.convert_layout(gl.sum(total, 1), ROW_LAYOUT)
        if item < rounds:
            divisor = gl.where(sums == 0.0, 1.0, sums)  # a query without keys gives zero
            first = (tile % q_tiles * GROUPS + INDEX) * ROWS
            tokens = first + gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
            out = out_ptr + (((batch * queries + tokens).to(gl.int64) * heads + head) * D)[:, None] + channels[None, :]
            present = (tokens < queries)[:, None]
            gl.store(out, (acc_0 / along(divisor, acc_0)).to(out_ptr.dtype.element_ty), mask=present)
            gl.store(out + HALF, (acc_1 / along(divisor, acc_1)).to(out_ptr.dtype.element_ty), mask=present)
            if lse_ptr is not None:
                tokens = first + gl.arange(0, ROWS, ROW_LAYOUT)
                lse = (top + gl.log2(sums)) * LN2
                gl.store(lse_ptr + (batch * heads + head) * queries + tokens, lse, mask=tokens < queries)
        else:
            first = ((gl.program_id(0) * 2 + item - rounds) * GROUPS + INDEX) * ROWS
            rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
            part = part_ptr + (rows * D)[:, None] + channels[None, :]
            gl.store(part, acc_0)
            gl.store(part + HALF, acc_1)
            peak = peak_ptr + (first + gl.arange(0, ROWS, ROW_LAYOUT)) * 2
            gl.store(peak, top)
            gl.store(peak + 1, sums)


@gluon.jit
def barriers(COUNT: gl.constexpr, READERS: gl.constexpr):
    """Barriers of COUNT buffers: "ready", which the loading warp arms, and "free", at which READERS arrive."""
    ready = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return ready, free


@gluon.jit(do_not_specialize=["layout_0", "layout_1", "queries", "heads", "tiles"])
def hopper_kernel(
    q_desc, k_desc_0, v_desc_0, k_desc_1, v_desc_1, length_ptr_0, length_ptr_1, descale_ptr_0, descale_ptr_1,
    qk_descale_ptr, out_ptr, lse_ptr, part_ptr, peak_ptr, layout_0, layout_1, queries, heads, tiles, scale,
    GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`layout_i`: slots, rows and padded rows of each; `tiles`: of GROUPS * ROWS queries, of all heads and samples;
    `part_ptr`, `peak_ptr`: see `merge_kernel`."""
    D: gl.constexpr = q_desc.block_shape[2]
    dtype: gl.constexpr = q_desc.dtype
    length_0, slots_0, key_tiles = segment_slots(length_ptr_0, layout_0)
    length_1 = 0
    if k_desc_1 is not None:
        length_1, _, tiles_1 = segment_slots(length_ptr_1, layout_1)
        key_tiles += tiles_1
    key_tiles = gl.maximum(key_tiles, 1)
    q_tiles = gl.cdiv(queries, GROUPS * ROWS)
    rounds, items = count_work(tiles)

    row_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D], row_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], row_layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], row_layout)  # e4m3: [d, KEYS], which is as large
    q_bars, bars = barriers(GROUPS, 1), barriers(STAGES, GROUPS)
    loads = (
        q_desc, k_desc_0, v_desc_0, k_desc_1, v_desc_1, q_smem, k_smem, v_smem, q_bars, bars, slots_0, length_0,
        length_1, layout_0, layout_1, key_tiles, rounds, items, q_tiles, tiles, heads,
    )  # fmt: skip
    work = (
        q_smem, k_smem, v_smem, q_bars, bars, qk_descale_ptr, descale_ptr_0, descale_ptr_1, out_ptr, lse_ptr, part_ptr,
        peak_ptr, slots_0, length_0, length_1, layout_0, layout_1, key_tiles, rounds, items, queries, q_tiles, tiles,
        heads, scale,
    )  # fmt: skip
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (consume, (work, 0, GROUPS, STAGES, D)),
                (consume, (work, 1, GROUPS, STAGES, D)),
                (consume, (work, 2, GROUPS, STAGES, D)),
                (produce, (loads, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (work, 0, GROUPS, STAGES, D)),
                (consume, (work, 1, GROUPS, STAGES, D)),
                (produce, (loads, GROUPS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
