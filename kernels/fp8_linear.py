"""FP8 linear layer: e4m3 operands, dynamic activation scales, static weight scales, one rounding to bfloat16.

    x8, s = quantize_fp8(x);  y = cast(bf16((x8 * s) @ (weight8 * weight_descale).T + bias), dtype(x))

Two ops that a compiler can pull apart: `quantize_rows` joins the op that made x, `fp8_matmul` stays.
Granularity "tensor": one scale for the whole tensor (the published recipe; liveavatar.md, 5.4). "row": one scale per
row of x (token) and of the weight (output channel). `quantize_rows.py` has the formulas.
Shapes: x [..., K]; weight8 [N, K] e4m3fn; weight_descale float32 [1] or [N, 1]; bias [N]; result [..., N] like x.
Dtypes: the result is rounded to bfloat16, then returned in the dtype of x. NaN stays in its row ("row").
"""

import torch
from torch import Tensor

from . import fp8_matmul as matmul
from .cases import Case, Op, randn
from .dispatch import fused
from .quantize_rows import Granularity, quantize_fp8, quantize_rows


def reference(
    x: Tensor, weight8: Tensor, weight_descale: Tensor, bias: Tensor | None, granularity: Granularity = "tensor"
) -> Tensor:
    x8, descale = quantize_fp8(x, granularity)
    return matmul.reference(x8, descale, weight8, weight_descale, bias).to(x.dtype)


def fp8_linear(
    x: Tensor, weight8: Tensor, weight_descale: Tensor, bias: Tensor | None, granularity: Granularity = "tensor"
) -> Tensor:
    """FP8 linear layer; see the module docstring. On CUDA through the library's scaled product."""
    if not fused(x, weight8, weight_descale, bias):
        return reference(x, weight8, weight_descale, bias, granularity)
    x8, descale = quantize_rows(x) if granularity == "row" else quantize_fp8(x, granularity)
    return matmul.fp8_matmul(x8, descale, weight8, weight_descale, bias).to(x.dtype)


def _case(name: str, tokens: int, k: int, n: int, granularity: Granularity, small: bool = False) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        x = randn(1, tokens, k, device=device, generator=generator, dtype=torch.bfloat16)
        weight = randn(n, k, device=device, generator=generator, scale=k**-0.5)
        weight8, descale = quantize_fp8(weight, granularity)
        bias = randn(n, device=device, generator=generator, dtype=torch.bfloat16)
        return {"x": x, "weight8": weight8, "weight_descale": descale, "bias": bias, "granularity": granularity}

    flops, cost = 2 * tokens * n * k, 2 * tokens * (k + n) + n * k
    return Case(name, inputs, 0 if small else flops, 0 if small else cost, small)


def cases() -> list[Case]:
    """LiveAvatar 14B at 704x384: q or o, the two feed-forward products, audio keys of one block; awkward ones."""
    return [
        _case("o", 3168, 5120, 5120, "row"),
        _case("feed-forward in", 3168, 5120, 13824, "row"),
        _case("feed-forward out", 3168, 13824, 5120, "row"),
        _case("audio keys", 15, 5120, 5120, "row"),
        _case("published recipe", 3168, 5120, 5120, "tensor"),
        _case("15 rows", 15, 64, 48, "row", small=True),
        _case("15 rows, one scale", 15, 64, 48, "tensor", small=True),
    ]


OP = Op("fp8_linear", fp8_linear, reference, cases, differentiable=False)
