"""Flash attention for Hopper in Gluon: one kernel for e4m3 and for 2-byte types, d = 64 or 128.

A persistent program runs on every multiprocessor and takes tiles of 128 queries of one head. Its warps have three
roles (Shah et al., "FlashAttention-3", 2024): one warp loads keys and values by TMA into a ring of stages in shared
memory; two warpgroups hold 64 queries each. Stage i of a tile holds keys i and values i - 1, since a warpgroup starts
the scores of a key tile and the products of the tile before together, and waits for both once. While it computes its
softmax, the tensor cores work for the other warpgroup.

Keys lie in one or two segments of slots (`Fp8Segment`; a 2-byte segment is one slot). Of every slot the tile that is
not full comes first, so that one branch masks it and changes the unit of the accumulator. An e4m3 tile starts at a
multiple of N rows, since slots are padded; a 2-byte tile may start before its segment, where TMA gives zeros: whatever
lies beyond the valid rows is never read.

e4m3: the columns of the scores follow the accumulator's order, not the operand's (see `pack`), so the descriptor of the
keys swaps the rows of every sixteen. Products of a key tile are added in float32, since Hopper's FP8 tensor cores
accumulate with fewer bits.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

ROWS = gl.constexpr(64)
"""Queries of one warpgroup."""
KEYS = gl.constexpr(128)
"""Keys of a tile."""
LOWEST = gl.constexpr(-1e30)
"""The running maximum before the first key; finite, so that its difference to a masked score is one."""
SHIFT = gl.constexpr(12582912.0 + 127.0)
C0 = gl.constexpr(1.00044305)
C1 = gl.constexpr(0.70344488)
C2 = gl.constexpr(0.23842675)
LOG2_448 = gl.constexpr(8.807354922057604)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def segment_slots(length_ptr, layout):
    """Valid rows of a segment, the slots that they fill, and their key tiles."""
    count, rows = layout[0], layout[1]
    length = gl.to_tensor(count) * rows
    if length_ptr is not None:
        length = gl.minimum(gl.load(length_ptr).to(gl.int32), length)
    tiles = length // rows * gl.cdiv(rows, KEYS) + gl.cdiv(length % rows, KEYS)
    return length, gl.cdiv(length, rows), tiles


@gluon.jit
def slot_tiles(slot, slots_0, length_0, length_1, layout_0, layout_1):
    """Valid rows and key tiles of a slot, counted through both segments; a call without keys sees one masked tile."""
    if slot < slots_0:
        valid = gl.minimum(length_0 - slot * layout_0[1], layout_0[1])
    else:
        valid = gl.minimum(length_1 - (slot - slots_0) * layout_1[1], layout_1[1])
    valid = gl.maximum(valid, 0)
    return valid, gl.maximum(gl.cdiv(valid, KEYS), 1)


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
def produce(
    q_desc, k_desc_0, v_desc_0, k_desc_1, v_desc_1, q_smem, k_smem, v_smem, q_bars, bars, slots_0, length_0, length_1,
    layout_0, layout_1, key_tiles, q_tiles, tiles, heads,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of a tile, then its keys and values in the order in which they are used."""
    D: gl.constexpr = q_desc.block_shape[2]
    SIZE: gl.constexpr = q_desc.dtype.primitive_bitwidth // 8
    FP8: gl.constexpr = q_desc.dtype == gl.float8e4nv
    q_ready, q_free = q_bars
    ready, free = bars
    done = 0  # stages
    turn = 0  # query tiles
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        batch, head = (tile // q_tiles) // heads, (tile // q_tiles) % heads
        for half in gl.static_range(2):
            mbarrier.wait(q_free.index(half), (turn & 1) ^ 1)
            mbarrier.expect(q_ready.index(half), ROWS * D * SIZE)
            tma.async_copy_global_to_shared(
                q_desc, [batch, (tile % q_tiles * 2 + half) * ROWS, head * D], q_ready.index(half),
                q_smem.index(half)._reinterpret(q_desc.dtype, q_desc.block_shape, q_desc.layout),
            )  # fmt: skip
        slot = 0
        valid, left = slot_tiles(0, slots_0, length_0, length_1, layout_0, layout_1)
        count = left
        last_row = 0
        last_first = True
        for i in range(key_tiles):
            first = slot < slots_0
            if FP8:
                row = (left - 1) * KEYS
                if k_desc_1 is None or first:
                    row += slot * layout_0[2]
                else:
                    row += (slot - slots_0) * layout_1[2]
            else:
                row = valid - left * KEYS
            if i == 0:  # weights of zero meet these values
                last_row = row
                last_first = first
            stage, phase = ring(done, STAGES)
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), phase ^ 1)
            mbarrier.expect(bar, 2 * KEYS * D * SIZE)
            if k_desc_1 is None or first:
                load_keys(k_desc_0, row, batch, head, layout_0[0] * layout_0[2], bar, k_smem.index(stage))
            else:
                load_keys(k_desc_1, row, batch, head, layout_1[0] * layout_1[2], bar, k_smem.index(stage))
            if k_desc_1 is None or last_first:
                load_values(v_desc_0, last_row, batch, head, heads, bar, v_smem.index(stage))
            else:
                load_values(v_desc_1, last_row, batch, head, heads, bar, v_smem.index(stage))
            last_row = row
            last_first = first
            left -= 1
            if left == 0:
                slot += 1
                valid, left = slot_tiles(slot, slots_0, length_0, length_1, layout_0, layout_1)
                count = left
            done += 1
        stage, phase = ring(done, STAGES)
        bar = ready.index(stage)
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(bar, KEYS * D * SIZE)
        if k_desc_1 is None or last_first:
            load_values(v_desc_0, last_row, batch, head, heads, bar, v_smem.index(stage))
        else:
            load_values(v_desc_1, last_row, batch, head, heads, bar, v_smem.index(stage))
        done += 1
        turn += 1


@gluon.jit
def halve(x):
    """The left and the right half [M, N / 2] of x [M, N]."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return gl.split(gl.permute(gl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@gluon.jit
def fold_max(x):
    """Maxima over the columns that are equal modulo 8, [M, 8]: as far as one thread sees them."""
    for _ in gl.static_range(4):
        left, right = halve(x)
        x = gl.maximum(left, right)
    return x


@gluon.jit
def fold_sum(x):
    """Sums over the columns that are equal modulo 8, [M, 8]."""
    for _ in gl.static_range(4):
        left, right = halve(x)
        x = left + right
    return x


@gluon.jit
def exp2_polynomial(x):
    """2^x on the multiply-add units, to 1.8e-3 of its value: enough for weights that round to e4m3.

    x = n + f with n an integer and f in [-1/2, 1/2]; adding 1.5 * 2^23 + 127 leaves n + 127, the exponent of 2^n, in the
    last bits of the sum.
    """
    x = gl.maximum(x, -40.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + SHIFT
    f = x - (shifted - SHIFT)
    power = (shifted.to(gl.int32, bitcast=True) << 23).to(gl.float32, bitcast=True)
    return ((C2 * f + C1) * f + C0) * power


@gluon.jit
def exp2_shared(x, POLY: gl.constexpr):
    """2^x [M, N], some columns on the multiply-add units: the special-function units alone would be the bottleneck."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    if POLY == 0:
        result = gl.exp2(x)
    else:
        left, right = halve(x)
        if POLY == 1:
            right = exp2_shared(right, 2)
        else:
            right = exp2_polynomial(right)
        both = gl.join(gl.exp2(left), right)
        result = gl.convert_layout(
            gl.reshape(gl.permute(both, (0, 2, 1)), (M, N)), x.type.layout, assert_trivial=True
        )
    return result


@gluon.jit
def along(row, like):
    """A value a row, as a column beside `like` [M, N]."""
    return gl.convert_layout(row, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def pack(weights, dtype: gl.constexpr):
    """Weights [M, N] in float32, rounded to `dtype` -> words int32 [M, N / 4 or N / 2] in the operand's order.

    A loop carries words in registers as they are; single bytes it would take apart and put together in every turn.
    """
    M: gl.constexpr = weights.shape[0]
    N: gl.constexpr = weights.shape[1]
    if dtype == gl.float8e4nv:
        # of sixteen columns thread t of four holds 8j + 2t + b (j, b in 0, 1), and is to hold 4t + 2j + b
        columns = gl.permute(gl.reshape(weights, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
        even, odd = gl.split(gl.reshape(columns, (M, N // 4, 2, 2)))
        w0, w2 = gl.split(even)
        w1, w3 = gl.split(odd)
        words = gl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [w0, w1, w2, w3],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        even, odd = gl.split(gl.reshape(weights, (M, N // 2, 2)))
        name: gl.constexpr = "bf16" if dtype == gl.bfloat16 else "f16"
        words = gl.inline_asm_elementwise(
            "cvt.rn." + name + "x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    return words


@gluon.jit
def unpack(words, dtype: gl.constexpr, layout: gl.constexpr):
    """Words of `pack` -> [M, N] as the first operand of a product; nothing moves between threads."""
    M: gl.constexpr = words.shape[0]
    if dtype == gl.float8e4nv:
        b0, b1 = words.to(gl.int8), (words >> 8).to(gl.int8)
        b2, b3 = (words >> 16).to(gl.int8), (words >> 24).to(gl.int8)
        values = gl.reshape(gl.join(gl.join(b0, b2), gl.join(b1, b3)), (M, words.shape[1] * 4))
    else:
        values = gl.reshape(gl.join(words.to(gl.int16), (words >> 16).to(gl.int16)), (M, words.shape[1] * 2))
    return gl.convert_layout(values.to(dtype, bitcast=True), layout, assert_trivial=True)


@gluon.jit
def read_unit(descale_ptr_0, descale_ptr_1, slot, slots_0, layout_0, layout_1, batch, head, heads, dims):
    """Descale [d] of the values of a slot, counted through both segments."""
    D: gl.constexpr = dims.shape[0]
    if descale_ptr_1 is None or slot < slots_0:
        unit = gl.load(descale_ptr_0 + ((batch * layout_0[0] + slot) * heads + head) * D + dims)
    else:
        unit = gl.load(descale_ptr_1 + ((batch * layout_1[0] + slot - slots_0) * heads + head) * D + dims)
    return unit


@gluon.jit
def mask_tile(scores, valid, count, FP8: gl.constexpr):
    """The first tile of a slot, of which only some keys are valid: -inf for the others."""
    c = gl.arange(0, KEYS, gl.SliceLayout(0, scores.type.layout))
    if FP8:
        c = c // 16 * 16 + c % 8 // 2 * 4 + c % 16 // 8 * 2 + c % 2  # the key that each column holds
        seen = c < valid - (count - 1) * KEYS
    else:
        seen = c >= count * KEYS - valid
    return gl.where(seen[None, :], scores, float("-inf"))


@gluon.jit
def hold(x):
    """x [M], a running maximum, unchanged; what follows in the program runs only after it is known.

    The assembler would move a wait for the tensor cores up, before work that is to run beside them, but not over a
    fence. The maximum is never below LOWEST, so that the fence never runs.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.lt.f32 p, $2, 0fF2000000;
        setp.lt.or.f32 p, $3, 0fF2000000, p;
        @p membar.cta;
        mov.b32 $0, $2;
        mov.b32 $1, $3;
        }""",
        "=f,=f,f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def consume(
    q_smem, k_smem, v_smem, q_bars, bars, turns, qk_descale_ptr, descale_ptr_0, descale_ptr_1, out_ptr, lse_ptr,
    slots_0, length_0, length_1, layout_0, layout_1, key_tiles, queries, q_tiles, tiles, heads, scale,
    INDEX: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PINGPONG: gl.constexpr, HOLD: gl.constexpr, POLY: gl.constexpr,
):  # fmt: skip
    """One of two warpgroups: 64 queries of every tile."""
    q_ready, q_free = q_bars
    ready, free = bars
    dtype: gl.constexpr = k_smem.dtype
    FP8: gl.constexpr = dtype == gl.float8e4nv
    K_WIDTH: gl.constexpr = 256 // dtype.primitive_bitwidth
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, K_WIDTH])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, K_WIDTH])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 32 // dtype.primitive_bitwidth)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    bias: gl.constexpr = LOG2_448 if FP8 else 0.0
    dims = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    no_scores = gl.zeros((ROWS, KEYS), gl.float32, S_LAYOUT)
    nothing = gl.zeros((ROWS, D), gl.float32, O_LAYOUT)

    done = 0  # stages
    turn = 0  # query tiles
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        batch, head = (tile // q_tiles) // heads, (tile // q_tiles) % heads
        tile_scale = scale
        if qk_descale_ptr is not None:
            tile_scale = scale * gl.load(qk_descale_ptr + head)
        q = q_smem.index(INDEX)
        top = gl.full((ROWS,), LOWEST, gl.float32, ROW_LAYOUT)
        total = gl.zeros_like(fold_sum(no_scores))  # [M, 8]: of a row, what each thread has seen
        decay = gl.zeros((ROWS,), gl.float32, ROW_LAYOUT)
        acc = nothing
        words = gl.zeros_like(pack(no_scores, dtype))
        slot = 0
        valid, left = slot_tiles(0, slots_0, length_0, length_1, layout_0, layout_1)
        count = left
        mbarrier.wait(q_ready.index(INDEX), turn & 1)
        for i in range(key_tiles):
            stage, phase = ring(done, STAGES)
            mbarrier.wait(ready.index(stage), phase)
            if PINGPONG:
                mbarrier.wait(turns.index(INDEX), (done & 1) ^ (1 - INDEX))
            scores = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            p = unpack(words, dtype, P_LAYOUT)
            if FP8:
                product = warpgroup_mma(p, v_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            else:
                product = warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)
            if PINGPONG:
                mbarrier.arrive(turns.index(1 - INDEX))
            scores = warpgroup_mma_wait(1, [scores])
            fresh = left == count
            if fresh:
                scores = mask_tile(scores, valid, count, FP8)
            highest = gl.convert_layout(gl.max(fold_max(scores), 1), ROW_LAYOUT, assert_trivial=True)
            new_top = gl.maximum(top, highest * tile_scale)
            if HOLD == 1:
                new_top = hold(new_top)
                product, new_top = warpgroup_mma_wait(0, [product, new_top])
            next_decay = gl.exp2(top - new_top)
            top = new_top
            weights = exp2_shared(scores * tile_scale - (top - bias)[:, None], POLY)
            folded = fold_sum(weights)
            total = total * along(next_decay, total) + folded
            if HOLD == 0:
                product = warpgroup_mma_wait(0, [product])
            if HOLD == 2:
                row_sum = hold(gl.max(folded, 1))
                product, next_decay, row_sum = warpgroup_mma_wait(0, [product, next_decay, row_sum])
            mbarrier.arrive(free.index(stage))
            words = pack(weights, dtype)
            if FP8:
                acc = acc * along(decay, acc) + product
                if fresh and slot > 0:
                    old = read_unit(descale_ptr_0, descale_ptr_1, slot - 1, slots_0, layout_0, layout_1, batch, head,
                                    heads, dims)  # fmt: skip
                    new = read_unit(descale_ptr_0, descale_ptr_1, slot, slots_0, layout_0, layout_1, batch, head,
                                    heads, dims)  # fmt: skip
                    acc *= (old / new)[None, :]
            else:
                acc = product * along(next_decay, product)
            decay = next_decay
            left -= 1
            if left == 0 and i + 1 < key_tiles:
                slot += 1
                valid, left = slot_tiles(slot, slots_0, length_0, length_1, layout_0, layout_1)
                count = left
            done += 1
        mbarrier.arrive(q_free.index(INDEX))

        stage, phase = ring(done, STAGES)
        mbarrier.wait(ready.index(stage), phase)
        p = unpack(words, dtype, P_LAYOUT)
        if FP8:
            product = warpgroup_mma(p, v_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        else:
            product = warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)
        product = warpgroup_mma_wait(0, [product])
        mbarrier.arrive(free.index(stage))
        done += 1
        if FP8:
            acc = acc * along(decay, acc) + product
            unit = read_unit(descale_ptr_0, descale_ptr_1, slot, slots_0, layout_0, layout_1, batch, head, heads, dims)
            acc *= unit[None, :]
        else:
            acc = product
        sums = gl.convert_layout(gl.sum(total, 1), ROW_LAYOUT)
        acc = acc / along(gl.where(sums == 0.0, 1.0, sums), acc)  # a query without keys gives zero
        first = (tile % q_tiles * 2 + INDEX) * ROWS
        tokens = first + gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
        rows = ((batch * queries + tokens).to(gl.int64) * heads + head) * D
        gl.store(
            out_ptr + rows[:, None] + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=(tokens < queries)[:, None]
        )
        if lse_ptr is not None:
            tokens = first + gl.arange(0, ROWS, ROW_LAYOUT)
            lse = (top + gl.log2(sums)) * LN2
            gl.store(lse_ptr + (batch * heads + head) * queries + tokens, lse, mask=tokens < queries)
        turn += 1


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
    qk_descale_ptr, out_ptr, lse_ptr, layout_0, layout_1, queries, heads, tiles, scale,
    STAGES: gl.constexpr, PINGPONG: gl.constexpr, HOLD: gl.constexpr, POLY: gl.constexpr,
):  # fmt: skip
    """`layout_i`: slots, rows and padded rows of each; `tiles`: of 128 queries, of all heads and samples."""
    D: gl.constexpr = q_desc.block_shape[2]
    dtype: gl.constexpr = q_desc.dtype
    length_0, slots_0, key_tiles = segment_slots(length_ptr_0, layout_0)
    length_1 = 0
    if k_desc_1 is not None:
        length_1, slots_1, tiles_1 = segment_slots(length_ptr_1, layout_1)
        key_tiles += tiles_1
    key_tiles = gl.maximum(key_tiles, 1)
    q_tiles = gl.cdiv(queries, 2 * ROWS)

    row_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], row_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], row_layout)
    if dtype == gl.float8e4nv:
        column_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, KEYS], dtype)
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, D, KEYS], column_layout)
    else:
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], row_layout)
    q_bars, bars = barriers(2, 1), barriers(STAGES, 2)
    turns = barriers(2, 1)[0]
    gl.warp_specialize(
        [
            (consume, (
                q_smem, k_smem, v_smem, q_bars, bars, turns, qk_descale_ptr, descale_ptr_0, descale_ptr_1, out_ptr,
                lse_ptr, slots_0, length_0, length_1, layout_0, layout_1, key_tiles, queries, q_tiles, tiles, heads,
                scale, 0, STAGES, D, PINGPONG, HOLD, POLY,
            )),
            (consume, (
                q_smem, k_smem, v_smem, q_bars, bars, turns, qk_descale_ptr, descale_ptr_0, descale_ptr_1, out_ptr,
                lse_ptr, slots_0, length_0, length_1, layout_0, layout_1, key_tiles, queries, q_tiles, tiles, heads,
                scale, 1, STAGES, D, PINGPONG, HOLD, POLY,
            )),
            (produce, (
                q_desc, k_desc_0, v_desc_0, k_desc_1, v_desc_1, q_smem, k_smem, v_smem, q_bars, bars, slots_0,
                length_0, length_1, layout_0, layout_1, key_tiles, q_tiles, tiles, heads, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
