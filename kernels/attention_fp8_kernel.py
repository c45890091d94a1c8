"""Flash attention in FP8: the Triton kernel over e4m3 queries and keys, with values in e4m3 or in bfloat16.

One program holds BLOCK_M queries of one head and runs over the slots of each segment. Values in e4m3 have one scale a
slot, head and channel: the accumulator is kept in units of the slot being read, and is rescaled when the next slot
begins, so the inner loop knows nothing of scales. Weights go to e4m3 as 448 * exp2(s - max): the factor cancels in the
division by their float32 sum. Partial products of a key tile are added in float32, since the FP8 tensor cores of
Hopper accumulate with fewer bits.
"""

import triton
import triton.language as tl

from .attention_forward import online_softmax

LOG2_448 = tl.constexpr(8.807354922057604)


@triton.jit
def _key_order(N: tl.constexpr):
    """Which key of a tile each column of the scores takes, so that `_to_operand` moves nothing between threads.

    Of sixteen columns a Hopper accumulator gives thread t of four those at 8j + 2t + b (j, b in 0, 1); an FP8 operand
    wants 4t + 2j + b in their place.
    """
    c = tl.arange(0, N)
    return c // 16 * 16 + c % 8 // 2 * 4 + c % 16 // 8 * 2 + c % 2


@triton.jit
def _to_operand(weights):
    """Weights [M, N] whose columns follow `_key_order` -> e4m3 [M, N] in the order of the keys."""
    M: tl.constexpr = weights.shape[0]
    N: tl.constexpr = weights.shape[1]
    columns = tl.reshape(weights.to(tl.float8e4nv), (M, N // 16, 2, 4, 2))
    return tl.reshape(tl.permute(columns, (0, 1, 3, 2, 4)), (M, N))


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
    begin,
    end,
    length,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Key tiles from `begin` to `end` of one slot and head; with TAIL, keys from `length` on do not count.

    k [S, d] rows; v rows [S, d] in bfloat16, or [d, S] in e4m3 (Hopper's FP8 products want both operands along K).
    """
    cols, dims = tl.arange(0, BLOCK_N), tl.arange(0, D)
    FP8_VALUES: tl.constexpr = v_ptr.dtype.element_ty == tl.float8e4nv
    order = _key_order(BLOCK_N) if FP8_VALUES else cols
    for n in tl.range(begin, end, BLOCK_N):
        first = tl.cast(n, tl.int64)
        k_tile = k_ptr + first * k_stride + order[:, None] * k_stride + dims[None, :]  # [N, d]
        if FP8_VALUES:
            v_tile = v_ptr + first + dims[:, None] * v_stride + cols[None, :]  # [d, N]
        else:
            v_tile = v_ptr + first * v_stride + cols[:, None] * v_stride + dims[None, :]  # [N, d]
        if TAIL:
            k = tl.load(k_tile, mask=(n + order < length)[:, None], other=0.0)
            # e4m3 slots are padded to whole tiles with finite values, whose weights are zero
            v = tl.load(v_tile) if FP8_VALUES else tl.load(v_tile, mask=(n + cols < length)[:, None], other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        scores = tl.dot(q, tl.trans(k))  # [M, N]
        if TAIL:
            scores = tl.where((n + order < length)[None, :], scores, float("-inf"))
        if FP8_VALUES:
            weights, top, total, decay = online_softmax(scores, scale, LOG2_448, top, total)
            acc = acc * decay[:, None] + tl.dot(_to_operand(weights), tl.trans(v))
        else:
            weights, top, total, decay = online_softmax(scores, scale, 0.0, top, total)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return acc, top, total


@triton.jit
def fp8_kernel(
    q_ptr,
    keys,
    values,
    descales,
    lengths,
    qk_descale_ptr,
    out_ptr,
    slots,
    strides,
    q_strides,
    queries,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    present = tokens < queries
    q_tile = q_ptr + batch * q_strides[0] + head * q_strides[2] + tokens[:, None].to(tl.int64) * q_strides[1]
    q = tl.load(q_tile + dims[None, :], mask=present[:, None], other=0.0)  # [M, d]
    scale *= tl.load(qk_descale_ptr + head)

    acc = tl.zeros((BLOCK_M, D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    unit = tl.full((D,), 1.0, tl.float32)  # of the accumulator's channels
    for i in tl.static_range(len(keys)):
        count, rows, stride = slots[3 * i], slots[3 * i + 1], slots[3 * i + 2]
        length = count * rows
        if lengths[i] is not None:
            length = tl.minimum(tl.load(lengths[i]).to(tl.int32), length)
        k_ptr = keys[i] + batch * strides[6 * i] + head * strides[6 * i + 2]
        v_ptr = values[i] + batch * strides[6 * i + 3] + head * strides[6 * i + 5]
        for slot in tl.range(0, tl.cdiv(length, rows)):
            valid = tl.minimum(length - slot * rows, rows)
            first = tl.cast(slot * stride, tl.int64)
            k_slot = k_ptr + first * strides[6 * i + 1]
            if descales[i] is not None:
                v_slot = v_ptr + first
                descale = tl.load(descales[i] + ((batch * count + slot) * heads + head) * D + dims)
                acc *= (unit / descale)[None, :]
                unit = descale
            else:
                v_slot = v_ptr + first * strides[6 * i + 4]
            full = valid // BLOCK_N * BLOCK_N
            acc, top, total = _attend(
                acc, top, total, q, k_slot, v_slot, strides[6 * i + 1], strides[6 * i + 4], 0, full, valid, scale,
                D, BLOCK_N, False,
            )  # fmt: skip
            acc, top, total = _attend(
                acc, top, total, q, k_slot, v_slot, strides[6 * i + 1], strides[6 * i + 4], full, valid, valid, scale,
                D, BLOCK_N, True,
            )  # fmt: skip

    out = acc * unit[None, :] / tl.where(total == 0.0, 1.0, total)[:, None]  # a query without keys gives zero
    out_tile = out_ptr + ((batch * queries + tokens[:, None]) * heads + head) * D + dims[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=present[:, None])
