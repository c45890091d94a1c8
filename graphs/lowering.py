"""A program without `kinora::` ops, as an exporter needs it: each op becomes what it does.

An op registered with PyTorch is opaque, and a C++ program does not have it. While `Lowered` runs, a call of such an op
runs the op's own body in its place, so a tracer records the body: plain ATen calls on a CPU, launches of Triton kernels
on a GPU (`kernels.launch`), which the compiler then packages. Two references read a length on the host, which no
exported graph can; they have forms of their own here, whose shapes are fixed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from ..kernels import attention_forward
from ..kernels.causal_conv3d import reference as causal_conv3d
from ..kernels.dispatch import triton_runs, using
from ..kernels.launch import traced_launches
from ..kernels.qk_norm_rope import apply_rope, head_norm_reference

Body = Callable[..., Any]


class Lowered(nn.Module):
    """`module` with every `kinora::` op replaced while it runs; same arguments, same results."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        with using(True), traced_launches(), _Bodies():
            return self.module(*inputs)


class _Bodies(TorchFunctionMode):
    """Calls the body of an op of ours instead of the op."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name if isinstance(func, OpOverload) else ""
        if not name.startswith("kinora::"):
            return func(*args, **(kwargs or {}))
        body = (IN_TRITON if triton_runs(args[0]) else IN_ATEN).get(name) or OPDEFS[name]._init_fn
        with self:  # a body may call other ops
            return body(*args, **(kwargs or {}))


def qkv_norm_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    ring_k: Tensor,
    ring_v: Tensor,
    write: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """`kernels.kv_cache.qkv_norm_rope` for a block that lies inside the ring."""
    q, k, v = qkv.chunk(3, -1)
    rows = write.long() + torch.arange(qkv.shape[1], device=qkv.device)
    ring_k.index_copy_(1, rows, head_norm_reference(k, weight_k, rope, num_heads, eps, ring_k.dtype))
    ring_v.index_copy_(1, rows, v.unflatten(-1, (num_heads, -1)).to(ring_v.dtype))
    return head_norm_reference(q, weight_q, rope, num_heads, eps, ring_k.dtype).contiguous()


def rope_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`kernels.rope_attention` with rows beyond a length hidden by a mask; they must hold finite values.

    The log-sum-exp is for training, so it is left empty.
    """
    dtype = values[0].dtype
    k = torch.cat([apply_rope(k, r, dtype) for k, r in zip(keys, ropes, strict=True)], 1)
    seen = [
        torch.ones(k.shape[1], dtype=torch.bool, device=q.device)
        if n is None
        else torch.arange(k.shape[1], device=q.device) < n
        for k, n in zip(keys, lengths, strict=True)
    ]
    if any(n is not None for n in lengths):
        mask = torch.cat(seen)[None].expand(q.shape[1], -1)
    q32, k32, v32 = (x.to(dtype).float().transpose(1, 2) for x in (q, k, torch.cat(list(values), 1)))
    out = F.scaled_dot_product_attention(q32, k32, v32, mask)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return out.transpose(1, 2).to(dtype).to(q.dtype).contiguous(), lse


IN_ATEN: dict[str, Body] = {
    "kinora::qkv_norm_rope": qkv_norm_rope,
    "kinora::rope_attention": rope_attention,
}
"""Ops whose plain body reads a value on the host -> the same without."""

IN_TRITON: dict[str, Body] = {
    "kinora::causal_conv3d": causal_conv3d,
    "kinora::rope_attention": attention_forward.forward,
}
"""Ops whose body cannot be traced as it is -> what an exported graph does instead: PyTorch cannot trace the TMA
descriptors of our convolution, so the library convolves; and the libraries of attention are not all for C++."""
