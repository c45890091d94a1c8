"""Adaptive layer norm: LayerNorm without affine, then a shift and scale chosen per token row.

    n = cast(LN(x));  y = n * (1 + scale[row]) + shift[row]

Shapes: x [B, L, D]; shift, scale [B, R, D] (strided views are read where they lie); `rows` [L] int gives the
modulation row of each token, or None: then R divides L and each row serves L / R consecutive tokens (frames, or the
whole sequence with R = 1). `adaln_fp8` returns (e4m3 [B, L, D], descale float32 [B, L, 1]): the result rounded to
bfloat16, then quantised as `quantize_rows` does.
Dtypes: statistics in float32, the normalised value is cast to the dtype of x, the rest follows torch's
promotion, so the dtype of shift and scale decides where the result rounds (wan.md, 2.3.5).
NaN or infinity in a token makes that token's result NaN and touches no other.
Errors: ValueError when R does not divide L, or `rows` has not L entries; TypeError for dtypes the kernel has not.
"""

from typing import Any

import torch
from torch import Tensor

from .cases import Case, Op, randn
from .dispatch import fused, triton_runs
from .norm import layer_norm
from .quantize_rows import quantize_fp8
from .row_norm import Norm, forward
from .row_norm_backward import row_norm_backward


def expand_rows(table: Tensor, length: int, rows: Tensor | None) -> Tensor:
    """Modulation rows [B, R, D] -> one per token [B, L, D] (R = 1 stays [B, 1, D] and broadcasts)."""
    if rows is not None:
        if rows.shape != (length,):
            raise ValueError(f"rows has shape {tuple(rows.shape)}; one entry per token is needed: ({length},)")
        return table[:, rows]
    count = table.shape[1]
    if count == 1 or count == length:
        return table
    if length % count:
        raise ValueError(f"{count} modulation rows do not divide {length} tokens; pass `rows`")
    return table.repeat_interleave(length // count, dim=1)


def check_tables(x: Tensor, rows: Tensor | None, **tables: Tensor | None) -> None:
    """ValueError unless every table is [B or 1, R or 1, D] with one R that `rows` or the token count of x allows."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; [batch, tokens, channels] is needed")
    batch, length, dim = x.shape
    given = {name: tuple(table.shape) for name, table in tables.items() if table is not None}
    counts = {shape[1] for shape in given.values() if len(shape) == 3} - {1}
    for name, shape in given.items():
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[2] != dim or len(counts) > 1:
            raise ValueError(f"{name} has shape {shape}; [{batch} or 1, R or 1, {dim}] is needed, one R in {given}")
    if rows is not None and rows.shape != (length,):
        raise ValueError(f"rows has shape {tuple(rows.shape)}; one entry per token is needed: ({length},)")
    for count in counts:
        if rows is None and length % count:
            raise ValueError(f"{count} modulation rows do not divide {length} tokens; pass `rows`")


def reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    length = x.shape[1]
    normed = layer_norm(x, eps=eps)
    y = normed * (1 + expand_rows(scale, length, rows)) + expand_rows(shift, length, rows)
    return y if out_dtype is None else y.to(out_dtype)


def reference_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return quantize_fp8(reference(x, shift, scale, rows, eps, torch.bfloat16), "row")


def result_dtype(x: Tensor, shift: Tensor, scale: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, scale.dtype), shift.dtype)


@torch.library.custom_op("kinora::adaln", mutates_args=())
def _adaln(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    if not triton_runs(x, shift, scale, rows):
        return reference(x, shift, scale, rows, eps, out_dtype).contiguous()
    norm = Norm(shift, scale, False, eps, x.dtype, out_dtype or result_dtype(x, shift, scale), False)
    return forward(x, None, None, rows, norm, x.dtype)[1]


@_adaln.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype or result_dtype(x, shift, scale))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, rows, ctx.eps, _ = inputs
    ctx.save_for_backward(x, shift, scale, rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, shift, scale, rows = ctx.saved_tensors
    dx, _, _, d_shift, d_scale = row_norm_backward(
        x, None, None, shift, scale, rows, ctx.eps, False, x.dtype, None, grad, x.dtype
    )
    return dx, d_shift, d_scale, None, None, None


_adaln.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("kinora::adaln_fp8", mutates_args=())
def _adaln_fp8(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if not triton_runs(x, shift, scale, rows):
        x8, descale = reference_fp8(x, shift, scale, rows, eps)
        return x8.contiguous(), descale
    norm = Norm(shift, scale, False, eps, x.dtype, torch.bfloat16, True)
    _, out, scales = forward(x, None, None, rows, norm, x.dtype)
    assert scales is not None
    return out, scales


@_adaln_fp8.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    descale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), descale


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Modulated layer norm; see the module docstring. `out_dtype` casts the result once, at the end."""
    if not fused(x, shift, scale, rows):
        return reference(x, shift, scale, rows, eps, out_dtype)
    check_tables(x, rows, shift=shift, scale=scale)
    return _adaln(x, shift, scale, rows, eps, out_dtype)


def adaln_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Modulated layer norm as FP8 with one scale a token; see the module docstring. Not differentiable."""
    check_tables(x, rows, shift=shift, scale=scale)
    if not fused(x, shift, scale, rows):
        return reference_fp8(x, shift, scale, rows, eps)
    return _adaln_fp8(x, shift, scale, rows, eps)


def _case(
    name: str,
    batch: int,
    tokens: int,
    count: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    small: bool = False,
    fp8: bool = False,
) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        x = randn(batch, tokens, dim, device=device, generator=generator, dtype=dtype)
        table = randn(batch, count, 6, dim, device=device, generator=generator, scale=0.5)
        return {"x": x, "shift": table[:, :, 0], "scale": table[:, :, 1]} | (
            {} if fp8 else {"out_dtype": torch.bfloat16}
        )

    values = batch * tokens * dim
    cost = values * (dtype.itemsize + (1 if fp8 else 2)) + 2 * batch * count * dim * 4
    return Case(name, inputs, 0 if small else 8 * values, 0 if small else cost, small, 5e-2 if fp8 else 1e-2)


def cases(fp8: bool = False) -> list[Case]:
    """One streaming block of LiveAvatar 14B, one bidirectional pass of Wan 1.3B; awkward ones."""
    return [
        _case("LiveAvatar 14B", 1, 3168, 3, 5120, fp8=fp8),
        _case("LiveAvatar 14B, float32 stream", 1, 3168, 3, 5120, torch.float32, fp8=fp8),
        _case("Wan 1.3B", 1, 32760, 1, 1536, fp8=fp8),
        _case("tail", 2, 6, 3, 300, small=True, fp8=fp8),
        _case("one token", 1, 1, 1, 20, torch.float32, small=True, fp8=fp8),
    ]


OP = Op("adaln", adaln, reference, cases)
FP8_OP = Op("adaln_fp8", adaln_fp8, reference_fp8, lambda: cases(fp8=True), differentiable=False)
