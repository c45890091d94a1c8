"""Attention by nvidia-cudnn-frontend (extra `gpu`), the library that reads the number of keys on the device.

    out = softmax(q K^T / sqrt(d)) V over the first `length` rows of K and V

Shapes: q [B, Lq, H, d], k and v [B, L, H, d] in float16 or bfloat16, `length` int32 [1] on the device or None for all
rows. Result like q (contiguous), log-sum-exp float32 [B, H, Lq]. PyTorch's own binding of cuDNN takes no length, so a
captured CUDA graph would keep the one that it was recorded with.
Non-finite values: rows beyond `length` must be finite (they are multiplied by zero). Inference only.
Errors: whatever cuDNN refuses is a RuntimeError (`attention_table.measure` then leaves it out).
Source: the operation "SDPA FP16/BF16 Forward" with a padding mask of NVIDIA's cuDNN frontend documentation.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a tensor [B, H, L, d]."""


@dataclass(frozen=True)
class Plan:
    """A compiled cuDNN graph: its tensors, by what is bound to them, and the bytes that it works in."""

    graph: Any
    tensors: tuple[Any, ...]  # q, k, v, result, log-sum-exp, and for a length: queries and keys
    workspace: int


@cache
def _handle(device: int) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def _plan(device: int, dtype: torch.dtype, q: Layout, k: Layout, v: Layout, out: Layout, by_length: bool) -> Plan:
    import cudnn

    half = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
    single = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=_handle(device)
    )
    inputs = [
        graph.tensor(name=name, dim=list(shape), stride=list(stride), data_type=half)
        for name, (shape, stride) in zip("qkv", (q, k, v), strict=True)
    ]
    batch, heads, queries, head_dim = q[0]
    one = [batch, 1, 1, 1]
    counts = [
        graph.tensor(name=name, dim=one, stride=[1, 1, 1, 1], data_type=cudnn.data_type.INT32)
        for name in (("queries", "keys") if by_length else ())
    ]
    padding = {"use_padding_mask": True, "seq_len_q": counts[0], "seq_len_kv": counts[1]} if by_length else {}
    result, stats = graph.sdpa(
        q=inputs[0], k=inputs[1], v=inputs[2], generate_stats=True, attn_scale=head_dim**-0.5, **padding
    )
    result.set_output(True).set_dim(list(out[0])).set_stride(list(out[1]))
    stats.set_output(True).set_dim([batch, heads, queries, 1]).set_data_type(single)
    stats.set_stride([heads * queries, queries, 1, 1])
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return Plan(graph, (*inputs, result, stats, *counts), graph.get_workspace_size())


@cache
def _counted(device: int, rows: int, batch: int) -> Tensor:
    return torch.full((batch,), rows, dtype=torch.int32, device=device)


def attend(q: Tensor, k: Tensor, v: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Result [B, Lq, H, d] and log-sum-exp [B, H, Lq]; see the module docstring."""
    import cudnn

    device = q.device.index
    batch, queries, heads, _ = q.shape
    q = q.to(v.dtype)
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    moved = [t.transpose(1, 2) for t in (q, k, v, out)]  # [B, H, L, d]
    layouts = [(tuple(t.shape), tuple(t.stride())) for t in moved]
    plan = _plan(device, v.dtype, *layouts, length is not None)
    bound = [*moved, lse]
    if length is not None:
        bound += [_counted(device, queries, batch), length.expand(batch).contiguous()]
    handle = _handle(device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
    room = torch.empty(max(plan.workspace, 1), dtype=torch.uint8, device=q.device)
    plan.graph.execute(dict(zip(plan.tensors, bound, strict=True)), room, handle=handle)
    return out, lse
