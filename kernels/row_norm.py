"""Triton kernel behind `adaln` and `residual_norm`: optional gated residual, layer norm, modulation or affine, and an
optional e4m3 result. One program a token row; the row is read once and stays in registers.

    u = x + y * gate[row];  stream = cast(u);  n = LN(cast(stream))
    out = n * (1 + scale[row]) + shift[row]   or   n * weight + bias

Where it rounds is data (`Rounding`), because the reference rounds where torch's promotion makes it round.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched
from .rows import (
    Tile,
    load_piece,
    normalize,
    rounded,
    row_major,
    store_fp8,
    store_piece,
    stream_piece,
    tile,
    triton_dtype,
)


@triton.jit
def _forward(
    x,  # [B, L, D]
    y,  # [B, L, D] or None
    gate,  # [B, R, D] or None: 1
    shift,  # [B, R, D], or bias [D]
    scale,  # [B, R, D], or weight [D]
    rows,  # [L] or None: tokens_per_row consecutive tokens share a row
    stream,  # [B, L, D] or None
    out,  # [B, L, D]
    descale,  # [B, L, 1], or None: out is not e4m3
    length,
    tokens_per_row,
    eps,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    gate_row,
    shift_batch,
    shift_row,
    scale_batch,
    scale_row,
    AFFINE: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    STREAM: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    OUT: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    batch = index // length
    token = index % length
    row = token // tokens_per_row if rows is None else tl.load(rows + token).to(tl.int64)
    x += batch * x_batch + token * x_token
    shift += batch * shift_batch + row * shift_row
    scale += batch * scale_batch + row * scale_row
    out += index * DIM
    if y is not None:
        y += batch * y_batch + token * y_token
    if gate is not None:
        gate += batch * gate_batch + row * gate_row
    if stream is not None:
        stream += index * DIM

    values = tl.tuple(())
    for i in tl.static_range(PIECES):
        u = stream_piece(x, i, DIM, BLOCK)
        if y is not None:
            branch = stream_piece(y, i, DIM, BLOCK)
            if gate is not None:
                branch = rounded(branch * load_piece(gate, i, DIM, BLOCK), PRODUCT)
            u = rounded(rounded(u + branch, SUM), STREAM)
        if stream is not None:
            store_piece(stream, u, i, DIM, BLOCK)
        values += (rounded(u, NORM),)

    normed, _ = normalize(values, eps, DIM, PIECES, BLOCK)
    result = tl.tuple(())
    for i in tl.static_range(PIECES):
        if AFFINE:
            h = normed[i] * load_piece(scale, i, DIM, BLOCK) + load_piece(shift, i, DIM, BLOCK)
        else:
            factor = rounded(1.0 + load_piece(scale, i, DIM, BLOCK), SCALE)
            h = rounded(rounded(normed[i], NORM) * factor, SCALED) + load_piece(shift, i, DIM, BLOCK)
        h = rounded(rounded(h, SHIFTED), OUT)
        if descale is None:
            store_piece(out, h, i, DIM, BLOCK)
        else:
            result += (h,)
    if descale is not None:
        store_fp8(out, descale + index, result, DIM, PIECES, BLOCK)


@dataclass(frozen=True)
class Norm:
    """The second half of the formula: modulated by tables [B or 1, R, D], or affine with vectors [D].

    `dtype`: to what the norm's input, and without affine its result, is rounded. `out_dtype`: dtype of the result;
    an e4m3 result is rounded to it first.
    """

    shift: Tensor
    scale: Tensor
    affine: bool
    eps: float
    dtype: torch.dtype
    out_dtype: torch.dtype
    fp8: bool


def table_strides(table: Tensor | None, batch: int) -> tuple[int, int]:
    """Strides of batch and row of a table [B or 1, R, D]; a vector [D], or none, has neither."""
    if table is None or table.dim() == 1:
        return 0, 0
    return (0 if table.shape[0] < batch else table.stride(0)), (0 if table.shape[1] == 1 else table.stride(1))


def forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    rows: Tensor | None,
    norm: Norm,
    stream_dtype: torch.dtype,
    tiling: Tile | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """-> (stream [B, L, D], or None without y; out [B, L, D]; descale [B, L, 1] float32, or None without fp8)."""
    batch, length, dim = x.shape
    tables = [table for table in (gate, norm.shift, norm.scale) if table is not None and table.dim() == 3]
    count = max((table.shape[1] for table in tables), default=1)
    x, shift, scale = row_major(x), row_major(norm.shift), row_major(norm.scale)
    y = None if y is None else row_major(y)
    gate = None if gate is None else row_major(gate)
    rows = None if rows is None else rows.contiguous()
    stream = None if y is None else torch.empty(x.shape, dtype=stream_dtype, device=x.device)
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn if norm.fp8 else norm.out_dtype, device=x.device)
    descale = torch.empty((batch, length, 1), dtype=torch.float32, device=x.device) if norm.fp8 else None
    tiling = tiling or tile(dim)
    product = x.dtype if y is None else y.dtype
    product = product if gate is None else torch.promote_types(product, gate.dtype)
    scaled = torch.promote_types(norm.dtype, scale.dtype)
    shifted = norm.dtype if norm.affine else torch.promote_types(scaled, shift.dtype)
    if batch * length:
        launched(_forward)[(batch * length,)](
            x,
            y,
            gate,
            shift,
            scale,
            rows,
            stream,
            out,
            descale,
            length,
            length // count if count else 1,
            norm.eps,
            *x.stride()[:2],
            *((0, 0) if y is None else y.stride()[:2]),
            *table_strides(gate, batch),
            *table_strides(shift, batch),
            *table_strides(scale, batch),
            AFFINE=norm.affine,
            PRODUCT=triton_dtype(product),
            SUM=triton_dtype(torch.promote_types(x.dtype, product)),
            STREAM=triton_dtype(stream_dtype),
            NORM=triton_dtype(norm.dtype),
            SCALE=triton_dtype(scale.dtype),
            SCALED=triton_dtype(scaled),
            SHIFTED=triton_dtype(shifted),
            OUT=triton_dtype(norm.out_dtype),
            DIM=dim,
            PIECES=tiling.pieces(dim),
            BLOCK=tiling.block,
            num_warps=tiling.num_warps,
        )
    return stream, out, descale
