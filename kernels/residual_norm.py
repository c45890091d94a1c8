"""The seam between two sub-layers in one pass: add a branch to the residual stream, then norm it for the next layer.

    u = x + y * gate[row]  (gate None: x + y);   stream = cast(u, stream_dtype);   n = LN(cast(stream, norm_dtype))
    h = cast(n, norm_dtype) * (1 + scale[row]) + shift[row]   (adaln)     or
    h = cast(n * weight + bias, norm_dtype)                   (layer norm with affine)

`residual_norm` returns (stream, h); `residual_norm_fp8` returns (stream, h8, descale): h rounded to bfloat16, then e4m3
[B, L, D] with float32 [B, L, 1], as `quantize_rows` does it.
Shapes: x, y [B, L, D]; gate, shift, scale [B or 1, R or 1, D], strided views welcome; weight, bias [D]; `rows` [L] as
in `adaln`. Give shift and scale, or weight and bias.
Dtypes: sums and products follow torch's promotion as in `gated_residual` and `adaln`; `stream_dtype` defaults to the
promoted dtype of u, `norm_dtype` to stream_dtype, `out_dtype` to the promoted dtype of h. The seams of LiveAvatar in
bf16 (liveavatar.md, 2.5, 2.8), gates and tables float32:

    after self attention    float32 stream, norm_dtype bfloat16, affine
    after cross attention   float32 stream, no gate, adaln, out_dtype bfloat16
    after the feed-forward  bfloat16 stream, adaln of the next block, out_dtype bfloat16
    before the injection    bfloat16 stream, norm_dtype float32, adaln with bfloat16 tables a frame, eps 1e-5
    after the injection     bfloat16 stream, no gate, adaln of the next block, out_dtype bfloat16

NaN or infinity in a token makes that token's h NaN and touches no other.
Errors: ValueError for both or neither kind of norm, and for shapes as in `adaln`; TypeError for other dtypes.
"""

from typing import Any

import torch
from torch import Tensor

from . import adaln, gated_residual
from .cases import Case, Op, randn
from .dispatch import fused, triton_runs
from .norm import layer_norm
from .quantize_rows import quantize_fp8
from .row_norm import Norm, forward
from .row_norm_backward import row_norm_backward


def reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    stream_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    u = x + y if gate is None else gated_residual.reference(x, y, gate, rows)
    stream = u.to(stream_dtype or u.dtype)
    normed = stream.to(norm_dtype or stream.dtype)
    if shift is not None and scale is not None:
        h = adaln.reference(normed, shift, scale, rows, eps)
    else:
        h = layer_norm(normed, weight, bias, eps)
    return stream, h.to(out_dtype or h.dtype)


def reference_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    stream_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    stream, h = reference(x, y, gate, shift, scale, weight, bias, rows, eps, stream_dtype, norm_dtype, torch.bfloat16)
    return stream, *quantize_fp8(h, "row")


def _unpack(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, bool]:
    """(shift, scale, False) or (bias, weight, True), and everything checked."""
    if x.shape != y.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}; they must be alike")
    if shift is not None and scale is not None and weight is None and bias is None:
        adaln.check_tables(x, rows, gate=gate, shift=shift, scale=scale)
        return shift, scale, False
    if weight is not None and bias is not None and shift is None and scale is None:
        adaln.check_tables(x, rows, gate=gate)
        if not weight.shape == bias.shape == x.shape[-1:]:
            raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be [{x.shape[-1]}]")
        return bias, weight, True
    raise ValueError("give shift and scale (adaln), or weight and bias (layer norm), and not both")


def _dtypes(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    affine: bool,
    stream_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The three dtypes with their defaults filled in."""
    u = torch.promote_types(x.dtype, y.dtype)
    stream = stream_dtype or (u if gate is None else torch.promote_types(u, gate.dtype))
    norm = norm_dtype or stream
    h = norm if affine else torch.promote_types(torch.promote_types(norm, scale.dtype), shift.dtype)
    return stream, norm, out_dtype or h


@torch.library.custom_op("kinora::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    affine: bool,
    stream_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`affine`: shift and scale are bias and weight."""
    if triton_runs(x, y, gate, shift, scale, rows):
        norm = Norm(shift, scale, affine, eps, norm_dtype, out_dtype, False)
        stream, h, _ = forward(x, y, gate, rows, norm, stream_dtype)
        assert stream is not None
        return stream, h
    pair = {"weight": scale, "bias": shift} if affine else {"scale": scale, "shift": shift}
    stream, h = reference(
        x,
        y,
        gate,
        rows=rows,
        eps=eps,
        stream_dtype=stream_dtype,
        norm_dtype=norm_dtype,
        out_dtype=out_dtype,
        **pair,
    )
    return stream.contiguous(), h.contiguous()


@torch.library.custom_op("kinora::residual_norm_fp8", mutates_args=())
def _residual_norm_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    affine: bool,
    stream_dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    if triton_runs(x, y, gate, shift, scale, rows):
        norm = Norm(shift, scale, affine, eps, norm_dtype, torch.bfloat16, True)
        stream, h8, descale = forward(x, y, gate, rows, norm, stream_dtype)
        assert stream is not None and descale is not None
        return stream, h8, descale
    pair = {"weight": scale, "bias": shift} if affine else {"scale": scale, "shift": shift}
    stream, h8, descale = reference_fp8(
        x, y, gate, rows=rows, eps=eps, stream_dtype=stream_dtype, norm_dtype=norm_dtype, **pair
    )
    return stream.contiguous(), h8.contiguous(), descale.contiguous()


@_residual_norm.register_fake
def _fake(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    affine: bool,
    stream_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=stream_dtype), x.new_empty(x.shape, dtype=out_dtype)


@_residual_norm_fp8.register_fake
def _fake_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    affine: bool,
    stream_dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    descale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=stream_dtype), x.new_empty(x.shape, dtype=torch.float8_e4m3fn), descale


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, gate, shift, scale, rows, ctx.eps, ctx.affine, _, ctx.norm_dtype, _ = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output[0], y, gate, shift, scale, rows)


def _backward(ctx: Any, d_stream: Tensor, d_h: Tensor) -> tuple[Tensor | None, ...]:
    stream, y, gate, shift, scale, rows = ctx.saved_tensors
    dx, dy, d_gate, d_shift, d_scale = row_norm_backward(
        stream, y, gate, shift, scale, rows, ctx.eps, ctx.affine, ctx.norm_dtype, d_stream, d_h, ctx.x_dtype
    )
    return dx, dy, None if gate is None else d_gate, d_shift, d_scale, None, None, None, None, None, None


_residual_norm.register_autograd(_backward, setup_context=_save)


def residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    stream_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(stream, h) [B, L, D] each; see the module docstring."""
    first, second, affine = _unpack(x, y, gate, shift, scale, weight, bias, rows)
    if not fused(x, y, gate, first, second, rows):
        return reference(x, y, gate, shift, scale, weight, bias, rows, eps, stream_dtype, norm_dtype, out_dtype)
    dtypes = _dtypes(x, y, gate, first, second, affine, stream_dtype, norm_dtype, out_dtype)
    return _residual_norm(x, y, gate, first, second, rows, eps, affine, *dtypes)


def residual_norm_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    stream_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(stream [B, L, D], h8 e4m3 [B, L, D], descale float32 [B, L, 1]); not differentiable."""
    first, second, affine = _unpack(x, y, gate, shift, scale, weight, bias, rows)
    if not fused(x, y, gate, first, second, rows):
        return reference_fp8(x, y, gate, shift, scale, weight, bias, rows, eps, stream_dtype, norm_dtype)
    stream_dtype, norm_dtype, _ = _dtypes(x, y, gate, first, second, affine, stream_dtype, norm_dtype, None)
    return _residual_norm_fp8(x, y, gate, first, second, rows, eps, affine, stream_dtype, norm_dtype)


def _case(
    name: str,
    shape: tuple[int, int, int],
    count: int,
    stream: tuple[torch.dtype, torch.dtype],
    norm_dtype: torch.dtype | None = None,
    gated: bool = True,
    affine: bool = False,
    table_dtype: torch.dtype = torch.float32,
    small: bool = False,
    fp8: bool = False,
) -> Case:
    """`stream`: dtypes of x and of the new stream; `count`: modulation rows."""
    batch, tokens, dim = shape
    half = torch.bfloat16

    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        def draw(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return randn(*size, device=device, generator=generator, dtype=dtype, scale=scale)

        table = draw(batch, count, 6, dim, dtype=torch.float32, scale=0.5)  # read where it lies, strided
        given: dict[str, object] = {"x": draw(*shape, dtype=stream[0]), "y": draw(*shape, dtype=half)}
        if gated:
            given["gate"] = table[:, :, 2]
        if affine:
            given |= {"weight": 1 + draw(dim, dtype=half, scale=0.1), "bias": draw(dim, dtype=half, scale=0.1)}
        else:
            given |= {"shift": table[:, :, 0].to(table_dtype), "scale": table[:, :, 1].to(table_dtype)}
        given |= {"stream_dtype": stream[1], "norm_dtype": norm_dtype}
        return given if fp8 else given | {"out_dtype": half}

    values, width = batch * tokens * dim, stream[0].itemsize + 2 + stream[1].itemsize + (1 if fp8 else 2)
    cost = values * width + (1 + 2 * (not affine)) * batch * count * dim * 4
    return Case(name, inputs, 0 if small else 10 * values, 0 if small else cost, small, 5e-2 if fp8 else 1e-2)


def cases(fp8: bool = False) -> list[Case]:
    """The seams of LiveAvatar 14B, one streaming block at 704x384; awkward ones."""
    half, full = torch.bfloat16, torch.float32
    big, tail = (1, 3168, 5120), (2, 6, 300)
    return [
        _case("after self attention", big, 3, (half, full), half, affine=True, fp8=fp8),
        _case("after cross attention", big, 3, (full, full), gated=False, fp8=fp8),
        _case("after the feed-forward", big, 3, (full, half), fp8=fp8),
        _case("before the injection", big, 3, (full, half), full, table_dtype=half, fp8=fp8),
        _case("after the injection", big, 3, (half, half), gated=False, fp8=fp8),
        _case("tail, affine", tail, 3, (half, full), half, affine=True, small=True, fp8=fp8),
        _case("tail, adaln", tail, 2, (full, half), full, table_dtype=half, small=True, fp8=fp8),
        _case("one token", (1, 1, 20), 1, (full, full), gated=False, small=True, fp8=fp8),
    ]


OP = Op("residual_norm", residual_norm, reference, cases)
FP8_OP = Op("residual_norm_fp8", residual_norm_fp8, reference_fp8, lambda: cases(fp8=True), differentiable=False)
