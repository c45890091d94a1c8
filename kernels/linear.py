"""Linear layer with one rounding: operands in the weight's dtype, sum and bias in float32, one cast.

    y = cast(x, dtype(w)) @ w.T + b

Shapes: x [..., K], weight [N, K], bias [N] or None; result [..., N] in the weight's dtype.
The CUDA libraries round once, after the bias; CPU kernels differ by machine, so the CPU path for half
precision multiplies in float32 and casts (numerics policy of the design). A weight that is a tensor subclass, as
torchao makes them, multiplies in its own way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .dispatch import autograd_by_reference, tracing

HALF = (torch.float16, torch.bfloat16)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.to(weight.dtype)
    if weight.dtype in HALF and x.device.type == "cpu" and not is_traceable_wrapper_subclass(weight):
        y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(weight.dtype)
    return F.linear(x, weight, bias)


@torch.library.custom_op("kinora::linear", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, bias)


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype)


autograd_by_reference(_op, _linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` in the dtype of `weight`, rounded once; one node for a tracer."""
    return _op(x, weight, bias) if tracing() else _linear(x, weight, bias)
