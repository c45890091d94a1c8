"""Gated residual sum: x + y * gate[row].

Shapes and `rows` as in `adaln`: x, y [B, L, D]; gate [B, R, D]. Dtypes follow torch's promotion: a float32 gate
makes the sum float32 (the residual stream of Wan 2.2), a bf16 gate rounds product and sum (Wan 2.1 as a module).
Where a norm follows, `residual_norm` does both in one pass. NaN and infinity stay in their element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adaln import check_tables, expand_rows
from .cases import Case, Op, randn
from .dispatch import autograd_by_reference, fused, triton_runs
from .launch import launched
from .row_norm import table_strides
from .rows import load_piece, rounded, row_major, store_piece, stream_piece, tile, triton_dtype


def reference(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    return x + y * expand_rows(gate, x.shape[1], rows)


@triton.jit
def _sum(
    x,  # [B, L, D]
    y,  # [B, L, D]
    gate,  # [B, R, D]
    rows,  # [L] or None: tokens_per_row consecutive tokens share a row
    out,  # [B, L, D]
    length,
    tokens_per_row,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    gate_row,
    PRODUCT: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    batch = index // length
    token = index % length
    row = token // tokens_per_row if rows is None else tl.load(rows + token).to(tl.int64)
    x += batch * x_batch + token * x_token
    y += batch * y_batch + token * y_token
    gate += batch * gate_batch + row * gate_row
    for i in tl.static_range(PIECES):
        product = rounded(stream_piece(y, i, DIM, BLOCK) * load_piece(gate, i, DIM, BLOCK), PRODUCT)
        store_piece(out + index * DIM, stream_piece(x, i, DIM, BLOCK) + product, i, DIM, BLOCK)


def result_dtype(x: Tensor, y: Tensor, gate: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.promote_types(y.dtype, gate.dtype))


@torch.library.custom_op("kinora::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    if not triton_runs(x, y, gate, rows):
        return reference(x, y, gate, rows).contiguous()
    batch, length, dim = x.shape
    x, y, gate = row_major(x), row_major(y), row_major(gate)
    rows = None if rows is None else rows.contiguous()
    out = x.new_empty(x.shape, dtype=result_dtype(x, y, gate))
    tiling = tile(dim)
    if batch * length:
        launched(_sum)[(batch * length,)](
            x,
            y,
            gate,
            rows,
            out,
            length,
            length // gate.shape[1],
            *x.stride()[:2],
            *y.stride()[:2],
            *table_strides(gate, batch),
            PRODUCT=triton_dtype(torch.promote_types(y.dtype, gate.dtype)),
            DIM=dim,
            PIECES=tiling.pieces(dim),
            BLOCK=tiling.block,
            num_warps=tiling.num_warps,
        )
    return out


@_gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=result_dtype(x, y, gate))


autograd_by_reference(_gated_residual, reference)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """`x + y * gate[row]`; see the module docstring."""
    if not fused(x, y, gate, rows):
        return reference(x, y, gate, rows)
    check_tables(x, rows, gate=gate)
    if x.shape != y.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}; they must be alike")
    return _gated_residual(x, y, gate, rows)


def _case(name: str, batch: int, tokens: int, count: int, dim: int, small: bool = False) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return randn(*shape, device=device, generator=generator, dtype=dtype)

        gate = draw(batch, count, 6, dim, dtype=torch.float32)[:, :, 2]
        return {"x": draw(batch, tokens, dim), "y": draw(batch, tokens, dim), "gate": gate}

    values = batch * tokens * dim
    cost = values * (2 + 2 + 4) + batch * count * dim * 4
    return Case(name, inputs, 0 if small else 2 * values, 0 if small else cost, small)


def cases() -> list[Case]:
    """One streaming block of LiveAvatar 14B, one bidirectional pass of Wan 1.3B; awkward ones."""
    return [
        _case("LiveAvatar 14B", 1, 3168, 3, 5120),
        _case("Wan 1.3B", 1, 32760, 1, 1536),
        _case("tail", 2, 6, 3, 300, small=True),
        _case("one token", 1, 1, 1, 20, small=True),
    ]


OP = Op("gated_residual", gated_residual, reference, cases)
