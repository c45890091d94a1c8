"""Gradients of `adaln` and `residual_norm` in one Triton kernel, registered as an op so that compilers can trace it.

With n, r = LN(stream), 1 / std;  f = 1 + scale[row] or weight;  dn = d_out * f;  means over the row:

    ds = d_stream + r * (dn - mean(dn) - n * mean(dn * n));   dx = ds;   dy = ds * gate[row]
    d_gate[row] = sum ds * y;   d_shift[row] = sum d_out;   d_scale[row] = sum d_out * n   over the row's tokens

A program walks some of the tokens of one modulation row and keeps the three sums in registers; the partial sums
[B, R, S, D] are then added by PyTorch. No atomics: the same bytes every time. Everything is float32 inside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import triton_runs
from .norm import layer_norm
from .row_norm import table_strides
from .rows import Tile, load_piece, normalize, rounded, row_major, store_piece, stream_piece, tile, triton_dtype

PROGRAMS = 264
"""Programs to aim for: two a multiprocessor of an H100 or H200; fixed, so that sums are the same on every card."""


@triton.jit
def _backward(
    stream,  # [B, L, D]
    y,  # [B, L, D] or None
    gate,  # [B, R, D] or None: 1
    scale,  # [B, R, D], or weight [D]
    order,  # [L] tokens sorted by modulation row, or None: they are in order, tokens_per_row each
    starts,  # [R + 1] where each row's tokens start in `order`, or None
    d_stream,  # [B, L, D] or None: 0
    d_out,  # [B, L, D]
    dx,  # [B, L, D]
    dy,  # [B, L, D] or None
    d_gate,  # [B, R, S, D] or None
    d_shift,  # [B, R, S, D]
    d_scale,  # [B, R, S, D]
    length,
    count,
    tokens_per_row,
    eps,
    y_batch,
    y_token,
    gate_batch,
    gate_row,
    scale_batch,
    scale_row,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)  # batch * count + row
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    batch = run // count
    row = run % count
    if order is not None:
        start = tl.load(starts + row)
        stop = tl.load(starts + row + 1)
    else:
        start = row * tokens_per_row
        stop = start + tokens_per_row
    share = tl.cdiv(stop - start, splits)
    first = start + split * share
    last = tl.minimum(first + share, stop)

    scale += batch * scale_batch + row * scale_row
    if gate is not None:
        gate += batch * gate_batch + row * gate_row
    sum_gate = tl.tuple(())
    sum_shift = tl.tuple(())
    sum_scale = tl.tuple(())
    for _ in tl.static_range(PIECES):
        sum_gate += (tl.zeros([BLOCK], tl.float32),)
        sum_shift += (tl.zeros([BLOCK], tl.float32),)
        sum_scale += (tl.zeros([BLOCK], tl.float32),)

    for position in range(first, last):
        token = position
        if order is not None:
            token = tl.load(order + position)
        at = (batch * length + token) * DIM
        values = tl.tuple(())
        for i in tl.static_range(PIECES):
            values += (rounded(stream_piece(stream + at, i, DIM, BLOCK), NORM),)
        normed, rstd = normalize(values, eps, DIM, PIECES, BLOCK)

        d_normed = tl.tuple(())
        next_shift = tl.tuple(())
        next_scale = tl.tuple(())
        total = tl.zeros([BLOCK], tl.float32)
        along = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(PIECES):
            dh = stream_piece(d_out + at, i, DIM, BLOCK)
            factor = load_piece(scale, i, DIM, BLOCK)
            n = normed[i]
            if not AFFINE:
                factor = rounded(1.0 + factor, SCALE)
                n = rounded(n, NORM)
            dn = dh * factor
            total += dn
            along += dn * normed[i]
            d_normed += (dn,)
            next_shift += (sum_shift[i] + dh,)
            next_scale += (sum_scale[i] + dh * n,)
        sum_shift = next_shift
        sum_scale = next_scale
        mean = tl.sum(total, 0) / DIM
        slope = tl.sum(along, 0) / DIM

        next_gate = tl.tuple(())
        for i in tl.static_range(PIECES):
            ds = rstd * (d_normed[i] - mean - normed[i] * slope)
            if d_stream is not None:
                ds += stream_piece(d_stream + at, i, DIM, BLOCK)
            store_piece(dx + at, ds, i, DIM, BLOCK)
            if y is not None:
                if gate is not None:
                    branch = stream_piece(y + batch * y_batch + token * y_token, i, DIM, BLOCK)
                    next_gate += (sum_gate[i] + ds * branch,)
                    ds *= load_piece(gate, i, DIM, BLOCK)
                store_piece(dy + at, ds, i, DIM, BLOCK)
        if gate is not None:
            sum_gate = next_gate

    partial = (run * splits + split) * DIM
    for i in tl.static_range(PIECES):
        store_piece(d_shift + partial, sum_shift[i], i, DIM, BLOCK)
        store_piece(d_scale + partial, sum_scale[i], i, DIM, BLOCK)
        if gate is not None:
            store_piece(d_gate + partial, sum_gate[i], i, DIM, BLOCK)


def backward_tile(dim: int) -> Tile:
    """Twice the warps of the forward pass: three sums live beside the row."""
    forward = tile(dim)
    return Tile(forward.block, min(2 * forward.num_warps, 16))


def _tokens_by_row(rows: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Tokens sorted by modulation row, and where each row starts among them; nothing when `rows` is None."""
    if rows is None:
        return None, None
    sorted_rows, order = torch.sort(rows, stable=True)
    return order, torch.searchsorted(sorted_rows, torch.arange(count + 1, dtype=rows.dtype, device=rows.device))


def launch(
    stream: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    affine: bool,
    norm_dtype: torch.dtype,
    d_stream: Tensor | None,
    d_out: Tensor,
    x_dtype: torch.dtype,
    tiling: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    batch, length, dim = stream.shape
    tables = [table for table in (gate, shift, scale) if table is not None and table.dim() == 3]
    count = max((table.shape[1] for table in tables), default=1)
    tiling = tiling or backward_tile(dim)
    splits = max(1, min(triton.cdiv(PROGRAMS, batch * count), triton.cdiv(length, 8 * count)))
    order, starts = _tokens_by_row(rows, count)
    stream, d_out, scale = stream.contiguous(), d_out.contiguous(), row_major(scale)
    d_stream = None if d_stream is None else d_stream.contiguous()
    y = None if y is None else row_major(y)
    gate = None if gate is None else row_major(gate)

    dx = torch.empty(stream.shape, dtype=x_dtype, device=stream.device)
    dy = None if y is None else torch.empty(stream.shape, dtype=y.dtype, device=stream.device)
    d_shift, d_scale = (stream.new_empty((batch, count, splits, dim), dtype=torch.float32) for _ in range(2))
    d_gate = None if gate is None else torch.empty_like(d_shift)
    _backward[(batch * count, splits)](
        stream,
        y,
        gate,
        scale,
        order,
        starts,
        d_stream,
        d_out,
        dx,
        dy,
        d_gate,
        d_shift,
        d_scale,
        length,
        count,
        length // count,
        eps,
        *((0, 0) if y is None else y.stride()[:2]),
        *table_strides(gate, batch),
        *table_strides(scale, batch),
        AFFINE=affine,
        NORM=triton_dtype(norm_dtype),
        SCALE=triton_dtype(scale.dtype),
        DIM=dim,
        PIECES=tiling.pieces(dim),
        BLOCK=tiling.block,
        num_warps=tiling.num_warps,
    )
    return dx, dy, None if d_gate is None else d_gate.sum(2), d_shift.sum(2), d_scale.sum(2)


def plain(
    stream: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    affine: bool,
    norm_dtype: torch.dtype,
    d_stream: Tensor | None,
    d_out: Tensor,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The same in plain PyTorch, for machines where Triton does not run."""
    batch, length, _ = stream.shape
    tables = [table for table in (gate, shift, scale) if table is not None and table.dim() == 3]
    count = max((table.shape[1] for table in tables), default=1)
    if rows is None:
        rows = torch.arange(length, device=stream.device) // (length // count)

    def of_tokens(table: Tensor) -> Tensor:
        return table.float().expand(-1, count, -1)[:, rows]  # [B or 1, L, D]

    def of_rows(values: Tensor) -> Tensor:
        return values.new_zeros((batch, count, values.shape[-1])).index_add(1, rows, values)  # [B, R, D]

    wide = stream.to(norm_dtype).float()
    rstd = torch.rsqrt(wide.var(-1, correction=0, keepdim=True) + eps)
    n = (wide - wide.mean(-1, keepdim=True)) * rstd
    dh = d_out.float()
    dn = dh * (scale.float() if affine else of_tokens(1 + scale))
    ds = rstd * (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True))
    ds = ds if d_stream is None else ds + d_stream.float()
    dy = None if y is None else (ds if gate is None else ds * of_tokens(gate)).to(y.dtype, copy=True)
    d_gate = None if gate is None or y is None else of_rows(ds * y.float())
    seen = n if affine else layer_norm(stream.to(norm_dtype), eps=eps).float()
    return ds.to(x_dtype), dy, d_gate, of_rows(dh), of_rows(dh * seen)


@torch.library.custom_op("kinora::row_norm_backward", mutates_args=())
def row_norm_backward(
    stream: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    affine: bool,
    norm_dtype: torch.dtype,
    d_stream: Tensor | None,
    d_out: Tensor,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (dx, dy, d_gate, d_shift, d_scale), each shaped and typed like its argument; what there is not is empty."""
    rows = None if affine and gate is None else rows  # no table has rows
    compute = launch if triton_runs(stream, scale, d_out) else plain
    dx, dy, d_gate, d_shift, d_scale = compute(
        stream, y, gate, shift, scale, rows, eps, affine, norm_dtype, d_stream, d_out, x_dtype
    )

    def like(table: Tensor | None, grad: Tensor | None) -> Tensor:
        if table is None or grad is None:
            return stream.new_empty(0)
        shape = (1, 1, table.shape[0]) if table.dim() == 1 else table.shape
        return grad.sum_to_size(shape).reshape(table.shape).to(table.dtype, copy=True)

    return dx, stream.new_empty(0) if dy is None else dy, like(gate, d_gate), like(shift, d_shift), like(scale, d_scale)


@row_norm_backward.register_fake
def _fake(
    stream: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    affine: bool,
    norm_dtype: torch.dtype,
    d_stream: Tensor | None,
    d_out: Tensor,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None) -> Tensor:
        return stream.new_empty(0) if t is None else t.new_empty(t.shape)

    return stream.new_empty(stream.shape, dtype=x_dtype), like(y), like(gate), like(shift), like(scale)
