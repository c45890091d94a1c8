"""Flash attention over several key segments: the Triton backward kernels and their launch.

The scores are computed again from the saved log-sum-exp (Dao, "FlashAttention-2", 2023, algorithm 2). One kernel owns a
tile of queries and runs over all keys (dq), another owns a tile of keys and runs over all queries (dk, dv); nothing is
accumulated across programs, so the result is deterministic. Keys come already rotated.

Legend: M queries of a tile, N keys of a tile, d head size. P = exp(S - lse), dP = dO V^T,
dS = P * (dP - rowsum(dO * O)), dQ = dS K / sqrt(d), dK = dS^T Q / sqrt(d), dV = P^T dO.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import LOG2E, Tiles, dense, precision


@triton.jit
def _delta_kernel(grad_ptr, out_ptr, delta_ptr, queries, heads, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """rowsum(dO * O) [B, H, Lq]; both tensors [B, Lq, H, d] contiguous."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = tokens < queries
    tile = ((batch * queries + tokens[:, None]) * heads + head) * D + tl.arange(0, D)[None, :]
    grad = tl.load(grad_ptr + tile, mask=present[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_ptr + tile, mask=present[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + (batch * heads + head) * queries + tokens, tl.sum(grad * out, 1), mask=present)


@triton.jit
def _row_statistics(lse_ptr, delta_ptr, tokens, queries):
    """Log-sum-exp in base 2 and rowsum(dO * O) of queries [M]; a query without keys, or none, gets P = 0."""
    present = tokens < queries
    lse = tl.load(lse_ptr + tokens, mask=present, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E
    return lse, tl.load(delta_ptr + tokens, mask=present, other=0.0)


@triton.jit
def _query_grad_kernel(
    grad_ptr,
    q_ptr,
    keys,
    values,
    lengths,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    rows,
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
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, dims = tl.arange(0, BLOCK_N), tl.arange(0, D)
    present = tokens < queries
    dtype = values[0].dtype.element_ty
    q_tile = q_ptr + batch * q_strides[0] + head * q_strides[2] + tokens[:, None].to(tl.int64) * q_strides[1]
    q = tl.load(q_tile + dims[None, :], mask=present[:, None], other=0.0).to(dtype)
    tile = ((batch * queries + tokens[:, None]) * heads + head) * D + dims[None, :]
    grad = tl.load(grad_ptr + tile, mask=present[:, None], other=0.0).to(dtype)
    row = (batch * heads + head) * queries
    lse, delta = _row_statistics(lse_ptr + row, delta_ptr + row, tokens, queries)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    column = 0  # of the mask, where this segment starts
    for i in tl.static_range(len(keys)):
        length = rows[i]
        if lengths[i] is not None:
            length = tl.minimum(tl.load(lengths[i]).to(tl.int32), length)
        k_ptr = keys[i] + batch * strides[6 * i] + head * strides[6 * i + 2]
        v_ptr = values[i] + batch * strides[6 * i + 3] + head * strides[6 * i + 5]
        for n in tl.range(0, length, BLOCK_N):
            first = tl.cast(n, tl.int64)
            valid = n + cols < length
            k_tile = k_ptr + first * strides[6 * i + 1] + cols[:, None] * strides[6 * i + 1] + dims[None, :]
            v_tile = v_ptr + first * strides[6 * i + 4] + cols[:, None] * strides[6 * i + 4] + dims[None, :]
            k = tl.load(k_tile, mask=valid[:, None], other=0.0).to(dtype)  # [N, d]
            v = tl.load(v_tile, mask=valid[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
            seen = valid[None, :] & present[:, None]
            if mask_ptr is not None:
                place = mask_ptr + tokens[:, None].to(tl.int64) * mask_stride + column + n + cols[None, :]
                seen = tl.load(place, mask=seen, other=0) != 0
            p = tl.where(seen, tl.exp2(scores * scale - lse[:, None]), 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(dtype), k, dq, input_precision=PRECISION)
        column += rows[i]
    dq *= scale / LOG2E
    tl.store(dq_ptr + tile, dq.to(dq_ptr.dtype.element_ty), mask=present[:, None])


@triton.jit
def _key_grad_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    length_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    rows,
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
    """dk, dv of one segment, [B, L, H, d] contiguous; `mask_ptr` points at the segment's first column."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D)
    dtype = v_ptr.dtype.element_ty
    length = rows
    if length_ptr is not None:
        length = tl.minimum(tl.load(length_ptr).to(tl.int32), rows)
    valid = cols < length
    k_tile = k_ptr + batch * strides[0] + head * strides[2] + cols[:, None].to(tl.int64) * strides[1] + dims[None, :]
    v_tile = v_ptr + batch * strides[3] + head * strides[5] + cols[:, None].to(tl.int64) * strides[4] + dims[None, :]
    k = tl.load(k_tile, mask=valid[:, None], other=0.0).to(dtype)  # [N, d]
    v = tl.load(v_tile, mask=valid[:, None], other=0.0)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    q_base = q_ptr + batch * q_strides[0] + head * q_strides[2]
    grad_base = grad_ptr + (batch * queries * heads + head) * D
    row = (batch * heads + head) * queries
    # a tile beyond the valid keys reads no query and stores zeros
    end = tl.where(tl.program_id(0) * BLOCK_N < length, queries, 0)
    for m in tl.range(0, end, BLOCK_M):
        tokens = m + tl.arange(0, BLOCK_M)
        present = tokens < queries
        q_tile = q_base + tokens[:, None].to(tl.int64) * q_strides[1] + dims[None, :]
        q = tl.load(q_tile, mask=present[:, None], other=0.0).to(dtype)  # [M, d]
        grad_tile = grad_base + tokens[:, None].to(tl.int64) * (heads * D) + dims[None, :]
        grad = tl.load(grad_tile, mask=present[:, None], other=0.0).to(dtype)
        lse, delta = _row_statistics(lse_ptr + row, delta_ptr + row, tokens, queries)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [N, M]
        seen = valid[:, None] & present[None, :]
        if mask_ptr is not None:
            place = mask_ptr + tokens[None, :].to(tl.int64) * mask_stride + cols[:, None]
            seen = tl.load(place, mask=seen, other=0) != 0
        p = tl.where(seen, tl.exp2(scores * scale - lse[None, :]), 0.0)
        dv = tl.dot(p.to(dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(dtype), q, dk, input_precision=PRECISION)
    dk *= scale / LOG2E
    tile = ((batch * rows + cols[:, None]) * heads + head) * D + dims[None, :]
    held = (cols < rows)[:, None]
    tl.store(dk_ptr + tile, dk.to(dk_ptr.dtype.element_ty), mask=held)
    tl.store(dv_ptr + tile, dv.to(dv_ptr.dtype.element_ty), mask=held)


def choose_tiles(dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Tiles of the kernels for dq, and for dk and dv."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)
    return Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)


def backward(
    grad: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> list[Tensor]:
    """Gradients of q, of all keys, of all values, in this order, contiguous and of their dtypes.

    `grad`, `out` [B, Lq, H, d] and `lse` [B, H, Lq] belong to `attention_forward.forward` on the same arguments.
    """
    batch, queries, heads, head_dim = q.shape
    tensors = (q, *keys, *values)
    grads = [t.new_empty(t.shape) for t in tensors]
    dq, dk, dv = grads[0], grads[1 : 1 + len(keys)], grads[1 + len(keys) :]
    if q.numel() == 0:
        return [g.zero_() for g in grads]
    grad, q = grad.contiguous(), dense(q)
    keys, values = [dense(k) for k in keys], [dense(v) for v in values]
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(queries, 64), batch * heads)](
        grad, out, delta, queries, heads, D=head_dim, BLOCK_M=64, num_warps=4
    )
    flags = None if mask is None else mask.contiguous().view(torch.uint8)
    strides = [(*k.stride()[:3], *v.stride()[:3]) for k, v in zip(keys, values, strict=True)]
    scale = head_dim**-0.5 * LOG2E.value
    for_queries, for_keys = choose_tiles(values[0].dtype)
    width = 0 if mask is None else mask.shape[1]
    _query_grad_kernel[(triton.cdiv(queries, for_queries.block_m), batch * heads)](
        grad,
        q,
        tuple(keys),
        tuple(values),
        tuple(lengths),
        flags,
        lse,
        delta,
        dq,
        tuple(k.shape[1] for k in keys),
        tuple(n for group in strides for n in group),
        q.stride()[:3],
        queries,
        heads,
        width,
        scale,
        D=head_dim,
        BLOCK_M=for_queries.block_m,
        BLOCK_N=for_queries.block_n,
        PRECISION=precision(values[0].dtype),
        num_warps=for_queries.num_warps,
        num_stages=for_queries.num_stages,
    )
    column = 0
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        rows = k.shape[1]
        if rows:
            _key_grad_kernel[(triton.cdiv(rows, for_keys.block_n), batch * heads)](
                grad,
                q,
                k,
                v,
                lengths[i],
                None if flags is None else flags[:, column:],
                lse,
                delta,
                dk[i],
                dv[i],
                rows,
                strides[i],
                q.stride()[:3],
                queries,
                heads,
                width,
                scale,
                D=head_dim,
                BLOCK_M=for_keys.block_m,
                BLOCK_N=for_keys.block_n,
                PRECISION=precision(v.dtype),
                num_warps=for_keys.num_warps,
                num_stages=for_keys.num_stages,
            )
        column += rows
    return grads
