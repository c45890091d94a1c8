"""Product of FP8 operands: e4m3 in, float32 sum, scales, bias, one rounding.

    y = cast((x8 * descale) @ (weight8 * weight_descale).T + bias, out_dtype)

Shapes: x8 [..., K] e4m3fn with descale float32 [..., 1] (a scale a token) or [1]; weight8 [N, K] e4m3fn with
weight_descale float32 [N, 1] (a scale an output channel) or [1]; both by row, or both [1]; bias [N] or None; result
[..., N] in `out_dtype`. On CUDA the library's scaled product `torch._scaled_mm`, which wants K and N to be multiples
of 16 and takes any M, rounds the bias to bfloat16 and returns bfloat16 when it scales by row.
`fast_accum`: partial sums stay in the tensor core's own precision (about 14 bits) instead of being added in float32
every few products; the published recipe runs so.
Not differentiable.  Errors: ValueError for wrong shapes, TypeError for operands that are not e4m3fn.
"""

import torch
from torch import Tensor

from .cases import Case, Op, randn
from .dispatch import fused
from .quantize_rows import quantize_fp8


def check(x8: Tensor, descale: Tensor, weight8: Tensor, weight_descale: Tensor, bias: Tensor | None) -> None:
    if x8.dtype != torch.float8_e4m3fn or weight8.dtype != torch.float8_e4m3fn:
        raise TypeError(f"operands are {x8.dtype} and {weight8.dtype}; both must be float8_e4m3fn, see quantize_fp8")
    (n, k), m = weight8.shape, x8.shape[:-1].numel()
    if x8.shape[-1] != k or (bias is not None and bias.shape != (n,)):
        bias_shape = None if bias is None else tuple(bias.shape)
        raise ValueError(f"x8 {tuple(x8.shape)}, weight8 {(n, k)} and bias {bias_shape} do not fit together")
    by_row, by_tensor = (m, n), (1, 1)
    if (descale.numel(), weight_descale.numel()) not in (by_row, by_tensor):
        raise ValueError(
            f"descales {tuple(descale.shape)} and {tuple(weight_descale.shape)}: "
            f"one a row each ({m} and {n}), or one each, is needed"
        )


def reference(
    x8: Tensor,
    descale: Tensor,
    weight8: Tensor,
    weight_descale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = True,  # the reference sums in float32 whatever it says
) -> Tensor:
    y = (x8.float() * descale).reshape(-1, x8.shape[-1]) @ (weight8.float() * weight_descale).T
    y = y if bias is None else y + bias.float()
    return y.to(out_dtype).reshape(*x8.shape[:-1], weight8.shape[0])


@torch.library.custom_op("kinora::fp8_matmul", mutates_args=())
def _fp8_matmul(
    x8: Tensor,
    descale: Tensor,
    weight8: Tensor,
    weight_descale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    if not x8.is_cuda:
        return reference(x8, descale, weight8, weight_descale, bias, out_dtype).contiguous()
    n, rowwise = weight8.shape[0], weight_descale.numel() > 1
    y = torch._scaled_mm(
        x8.reshape(-1, x8.shape[-1]).contiguous(),
        weight8.t(),  # [K, N], columns dense
        (descale.reshape(-1, 1) if rowwise else descale.reshape(1)).contiguous(),
        weight_descale.reshape(1, n) if rowwise else weight_descale.reshape(1),
        None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_accum,
    )
    return y.reshape(*x8.shape[:-1], n).to(out_dtype)


@_fp8_matmul.register_fake
def _(
    x8: Tensor,
    descale: Tensor,
    weight8: Tensor,
    weight_descale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    return x8.new_empty((*x8.shape[:-1], weight8.shape[0]), dtype=out_dtype)


def fp8_matmul(
    x8: Tensor,
    descale: Tensor,
    weight8: Tensor,
    weight_descale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = True,
) -> Tensor:
    """Scaled product of FP8 operands [..., N]; see the module docstring."""
    check(x8, descale, weight8, weight_descale, bias)
    if not fused(x8, descale, weight8, weight_descale, bias):
        return reference(x8, descale, weight8, weight_descale, bias, out_dtype)
    return _fp8_matmul(x8, descale, weight8, weight_descale, bias, out_dtype, fast_accum)


def _case(name: str, m: int, k: int, n: int, small: bool = False) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        x8, descale = quantize_fp8(randn(m, k, device=device, generator=generator), "row")
        weight = randn(n, k, device=device, generator=generator, scale=k**-0.5)
        weight8, weight_descale = quantize_fp8(weight, "row")
        bias = randn(n, device=device, generator=generator, dtype=torch.bfloat16)
        weights = {"weight8": weight8, "weight_descale": weight_descale, "bias": bias}
        return {"x8": x8, "descale": descale} | weights

    cost = m * k + n * k + 2 * m * n + 4 * m + 6 * n
    return Case(name, inputs, flops=0 if small else 2 * m * n * k, bytes=0 if small else cost, small=small)


def cases() -> list[Case]:
    """LiveAvatar 14B at 704x384: fused q/k/v, q or o, the feed-forward, audio keys; awkward ones."""
    return [
        _case("q/k/v", 3168, 5120, 15360),
        _case("o", 3168, 5120, 5120),
        _case("feed-forward in", 3168, 5120, 13824),
        _case("feed-forward out", 3168, 13824, 5120),
        _case("audio keys", 15, 5120, 5120),
        _case("15 rows", 15, 64, 48, small=True),
        _case("one row", 1, 32, 16, small=True),
    ]


OP = Op("fp8_matmul", fp8_matmul, reference, cases, differentiable=False)
