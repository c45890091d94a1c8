"""Half precision on the CPU with the design's rounding points, for modules that are not ours.

CPU kernels for float16 and bfloat16 differ by machine in how they accumulate. Inside `rounded_once()` the products
of half-precision CPU tensors are summed in float32 and rounded once (linear, matrix product, attention); a
convolution is rounded and its bias then added and rounded again. Everything else, and every other device and dtype,
runs as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...kernels import ops
from ...kernels.linear import HALF


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.float(), b.float()).to(a.dtype)


def _conv(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rounded(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        total = convolve(x.float(), weight.float(), None, *args, **kwargs).to(x.dtype)
        return total if bias is None else total + bias.view(-1, *(1,) * (total.ndim - 2))

    return rounded


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kw: Any):
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    wide = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask, *args, **kw)
    return wide.to(query.dtype)


RULES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: ops.linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.conv1d: _conv(F.conv1d),
    F.conv2d: _conv(F.conv2d),
    F.scaled_dot_product_attention: _attention,
}


class rounded_once(TorchFunctionMode):
    """Context manager: one rounding per product for half-precision CPU tensors (numerics policy of the design)."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule and args and args[0].dtype in HALF and args[0].device.type == "cpu":
            return rule(*args, **kwargs)
        return func(*args, **kwargs)
