"""Attention by nvidia-cudnn-frontend (extra `gpu`), the library that reads the number of keys on the device.

    out = softmax(q K^T / sqrt(d)) V over the first `length` rows of K and V

Shapes: q [B, Lq, H, d], k and v [B, L, H, d] in float16 or bfloat16, `length` int32 [1] on the device or None for all
rows. Result like q (contiguous), log-sum-exp float32 [B, H, Lq]. PyTorch's own binding of cuDNN takes no length, so a
captured CUDA graph would keep the one that it was recorded with. `attend_fp8` is the same in e4m3: `attention_joined`
says what it computes.
Non-finite values: rows beyond `length` must be finite (they are multiplied by zero). Inference only.
Errors: RuntimeError for what cuDNN refuses.
Source: the operations "SDPA FP16/BF16 Forward" and "SDPA FP8 Forward" with a padding mask in NVIDIA's documentation of
the cuDNN frontend.
"""

import threading
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a tensor [B, H, L, d]."""


E4M3 = torch.float8_e4m3fn
FP8_SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
"""What cuDNN calls the scales, in the order of `attention_joined.joined_scales`; s: the weights."""


FP8_SINCE = (1, 32)
"""The first version of the frontend whose FP8 attention was run without its maxima as outputs."""


@cache
def has_fp8() -> bool:
    """Whether a frontend that `attend_fp8` can use is installed; an older one serves `attend` alone."""
    try:
        found = version("nvidia-cudnn-frontend")
    except PackageNotFoundError:
        return False
    return tuple(int(part) for part in found.split(".")[:2]) >= FP8_SINCE


@dataclass(frozen=True)
class Plan:
    """A compiled cuDNN graph: its tensors, in the order in which `run` takes what is bound to them, and the bytes that
    it works in."""

    graph: Any
    tensors: tuple[Any, ...]
    workspace: int

    def run(self, *bound: Tensor) -> None:
        import cudnn

        device = bound[0].device
        handle = _handle(device.index, threading.get_ident())
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        room = torch.empty(max(self.workspace, 1), dtype=torch.uint8, device=device)
        self.graph.execute(dict(zip(self.tensors, bound, strict=True)), room, handle=handle)


@cache
def _handle(device: int, thread: int) -> Any:
    """A handle has one stream at a time, so every thread has its own."""
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def _plan(
    device: int, thread: int, dtype: torch.dtype, q: Layout, k: Layout, v: Layout, out: Layout, by_length: bool
) -> Plan:
    """Tensors: q, k, v, result; in e4m3 scales, else the log-sum-exp; counts."""
    import cudnn

    types = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", E4M3: "FP8_E4M3"}
    data, single = getattr(cudnn.data_type, types[dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=data, intermediate_data_type=single, compute_data_type=single, handle=_handle(device, thread)
    )
    batch, heads, queries, head_dim = q[0]
    one = [1, 1, 1, 1]
    inputs = {
        name: graph.tensor(name=name, dim=list(shape), stride=list(stride), data_type=data)
        for name, (shape, stride) in zip("qkv", (q, k, v), strict=True)
    }
    counts = [
        graph.tensor(name=name, dim=[batch, 1, 1, 1], stride=one, data_type=cudnn.data_type.INT32)
        for name in (("queries", "keys") if by_length else ())
    ]
    options: dict[str, Any] = {"attn_scale": head_dim**-0.5, "generate_stats": dtype != E4M3}
    if by_length:
        options |= {"use_padding_mask": True, "seq_len_q": counts[0], "seq_len_kv": counts[1]}
    if dtype == E4M3:
        scales = {name: graph.tensor(name=name, dim=one, stride=one, data_type=single) for name in FP8_SCALES}
        result, *_ = graph.sdpa_fp8(**inputs, **scales, **options)  # maxima as outputs would cost a memset each
        further = [*scales.values()]
    else:
        result, stats = graph.sdpa(**inputs, **options)
        stats.set_output(True).set_dim([batch, heads, queries, 1]).set_data_type(single)
        stats.set_stride([heads * queries, queries, 1, 1])
        further = [stats]
    result.set_output(True).set_dim(list(out[0])).set_stride(list(out[1])).set_data_type(data)
    try:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    except (cudnn.cudnnGraphNotSupportedError, ValueError) as error:
        raise RuntimeError(
            f"cuDNN refuses attention of {dtype} queries {q[0]} and keys {k[0]}; update nvidia-cudnn-frontend, or keep "
            "caches as RingFormat(values='fp8')"
        ) from error
    return Plan(graph, (*inputs.values(), result, *further, *counts), graph.get_workspace_size())


def _plan_for(q: Tensor, k: Tensor, v: Tensor, out: Tensor, by_length: bool) -> tuple[Plan, list[Tensor]]:
    """The plan of [B, L, H, d] tensors, and them as it takes them, [B, H, L, d]."""
    moved = [t.transpose(1, 2) for t in (q, k, v, out)]
    layouts = [(tuple(t.shape), tuple(t.stride())) for t in moved]
    return _plan(q.device.index, threading.get_ident(), v.dtype, *layouts, by_length), moved


@cache
def _counted(device: int, rows: int, batch: int) -> Tensor:
    return torch.full((batch,), rows, dtype=torch.int32, device=device)


def _counts(q: Tensor, length: Tensor | None) -> list[Tensor]:
    if length is None:
        return []
    batch, queries = q.shape[:2]
    return [_counted(q.device.index, queries, batch), length.expand(batch).contiguous()]


def attend(q: Tensor, k: Tensor, v: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Result [B, Lq, H, d] and log-sum-exp [B, H, Lq]; see the module docstring."""
    batch, queries, heads, _ = q.shape
    dtype, q = q.dtype, q.to(v.dtype)
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    plan, moved = _plan_for(q, k, v, out, length is not None)
    plan.run(*moved, lse, *_counts(q, length))
    return out.to(dtype), lse


def attend_fp8(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    """Result [B, Lq, H, d] in e4m3; `scales` of `attention_joined.joined_scales`."""
    out = torch.empty(q8.shape, dtype=E4M3, device=q8.device)
    plan, moved = _plan_for(q8, k8, v8, out, True)
    plan.run(*moved, *scales[: len(FP8_SCALES)].split(1), *_counts(q8, length))
    return out
