"""FP8 linear layer: e4m3 operands, dynamic activation scales, static weight scales, one rounding to bfloat16.

    s = 448 / max(amax, 1e-12);  x8 = e4m3(clamp(x * s, +-448));  y = bf16((x8 / s_x) @ (w8 / s_w).T + b)

Granularity "tensor": one scale for the whole tensor, capped at 448 as published (so tensors with amax < 1 do not use
the full range; liveavatar.md, 5.4). "row": one scale per row of x (token) and of the weight (output channel), uncapped.
Shapes: x [..., K]; weight8 [N, K] e4m3fn; weight_descale float32 [1] or [N, 1]; bias [N]; result [..., N] like x.
Dtypes: scale and product in float32, no rounding in between; descale 1/s is what is stored; the result is rounded to
bfloat16, then returned in the dtype of x.
"""

from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["tensor", "row"]
FP8_MAX = 448.0
AMAX_FLOOR = 1e-12
SCALE_CAP = 448.0


def quantize_fp8(x: Tensor, granularity: Granularity = "tensor") -> tuple[Tensor, Tensor]:
    """x [M, K] -> (e4m3fn [M, K], descale float32 [1] or [M, 1])."""
    wide = x.float()
    if granularity == "tensor":
        amax = wide.abs().amax().reshape(1)
        scale = (FP8_MAX / amax.clamp(min=AMAX_FLOOR)).clamp(max=SCALE_CAP)
    elif granularity == "row":
        scale = FP8_MAX / wide.abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
    else:
        raise ValueError(f"granularity {granularity!r} is not known; use 'tensor' or 'row'")
    return (wide * scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), 1.0 / scale


def reference(
    x: Tensor, weight8: Tensor, weight_descale: Tensor, bias: Tensor | None, granularity: Granularity = "tensor"
) -> Tensor:
    x8, descale = quantize_fp8(x.flatten(0, -2), granularity)
    y = (x8.float() * descale) @ (weight8.float() * weight_descale).T
    y = y if bias is None else y + bias.float()
    return y.to(torch.bfloat16).to(x.dtype).unflatten(0, x.shape[:-1])


def fp8_linear(
    x: Tensor, weight8: Tensor, weight_descale: Tensor, bias: Tensor | None, granularity: Granularity = "tensor"
) -> Tensor:
    """FP8 linear layer; see the module docstring. On CUDA through the library's scaled product."""
    if x.device.type != "cuda":
        return reference(x, weight8, weight_descale, bias, granularity)
    x8, descale = quantize_fp8(x.flatten(0, -2), granularity)
    b = None if bias is None else bias.to(torch.bfloat16)
    weight_scale = weight_descale.reshape(1, -1) if granularity == "row" else weight_descale
    y = torch._scaled_mm(x8, weight8.t(), descale, weight_scale, b, out_dtype=torch.bfloat16, use_fast_accum=True)
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def cases() -> list[dict[str, int]]:
    """LiveAvatar 14B at 704x384: q/k/v/o, the two feed-forward products, audio keys of one block."""
    return [
        {"tokens": 3168, "in_features": 5120, "out_features": 5120},
        {"tokens": 3168, "in_features": 5120, "out_features": 13824},
        {"tokens": 3168, "in_features": 13824, "out_features": 5120},
        {"tokens": 15, "in_features": 5120, "out_features": 5120},
    ]
