"""Normalisations shared by the ops: layer norm and full-width RMS norm with float32 statistics.

Both compute in float32 and cast the normalised value back to the dtype of x *before* any weight is applied:
that rounding point belongs to the models (specification wan.md, 2.3.1 and 2.3.5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import autograd_by_reference, tracing


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    w = None if weight is None else weight.float()
    b = None if bias is None else bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], w, b, eps).to(x.dtype)


@torch.library.custom_op("kinora::layer_norm", mutates_args=())
def _op(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _layer_norm(x, weight, bias, eps).contiguous()


@_op.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


autograd_by_reference(_op, _layer_norm)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last axis, float32 inside, result in the dtype of x. Shapes: x [..., D], weight [D]."""
    return _op(x, weight, bias, eps) if tracing() else _layer_norm(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`cast(x * rsqrt(mean(x^2) + eps)) * weight` over the last axis; result promoted from x and weight."""
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * weight
