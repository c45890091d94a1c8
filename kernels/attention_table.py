"""Which implementation of attention serves a call: ours, or a library's where it was measured to be faster.

Entries map a device and a shape class to a name. `measure` fills them (`python -m kinora.bench.attention` prints them,
ready to be put into `MEASURED`); without an entry cuDNN takes large half-precision calls on Hopper, as the numbers of
DESIGN.md say, and ours everything else.

A library needs one segment that lies in one tensor, without mask and table; the layout `kv_cache.JoinedCache` turns a
ring and condition keys into such a segment without copies. A length on the device only cuDNN's frontend can read.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from . import attention_cudnn
from .linear import HALF

Library = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""q, k, v [B, L, H, d] -> result like q, log-sum-exp float32 [B, H, Lq]."""

MEASURED: dict[str, dict[str, str]] = {
    "NVIDIA H200": {  # torch 2.11, CUDA 13, cuDNN 9.19
        "bfloat16 d128 h32 q2048 k8192": "sdpa-cudnn",  # the full cache: 1831 us; ours 2230, flash 2904
        "bfloat16 d128 h32 q2048 k4096": "sdpa-cudnn",  # the first block: 694; 1021, 1113
        "bfloat16 d128 h128 q2048 k8192": "sdpa-cudnn",  # four time-steps: 7198; 10367, 11365
        "bfloat16 d128 h32 q2048 k512": "sdpa-cudnn",  # text: 67; 123, 117
        "bfloat16 d128 h64 q1024 k4": "sdpa-cudnn",  # audio: 33.6; 35.3, 40.6
        "bfloat16 d128 h32 q2048 k8192 counted": "cudnn-frontend",  # 1698 us; ours 2400 in two segments
    }
}
"""Device name -> shape class -> implementation."""


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = [x.to(v.dtype).transpose(1, 2) for x in (q, k, v)]  # [B, H, L, d]
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True)[:2]
    return _finish(out.transpose(1, 2), lse, q)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = [x.to(v.dtype).transpose(1, 2) for x in (q, k, v)]  # [B, H, L, d]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*heads)[:2]
    return _finish(out.transpose(1, 2), lse, q)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    out, lse, _ = flash_attn_func(q.to(v.dtype), k.to(v.dtype), v, return_attn_probs=True)
    return _finish(out, lse, q)


def _finish(out: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    # libraries may pad the rows of the log-sum-exp
    return out.to(q.dtype).contiguous(), lse.reshape(batch, heads, -1)[:, :, :queries].float().contiguous()


LIBRARIES: dict[str, Library] = {"sdpa-cudnn": sdpa_cudnn, "sdpa-flash": sdpa_flash, "flash-attn": flash_attn}
COUNTING = "cudnn-frontend"
"""The library that serves calls whose length lies on the device; `attention_cudnn.attend` takes it as `length`."""
COUNTED = " counted"
"""End of the shape classes of such calls."""


@cache
def available() -> tuple[str, ...]:
    """Names of the implementations that can run in this process."""
    packages = {"flash-attn": "flash_attn", COUNTING: "cudnn"}
    return ("triton", "sdpa-cudnn", "sdpa-flash", *(name for name, module in packages.items() if find_spec(module)))


def shape_class(q: Tensor, k: Tensor, dtype: torch.dtype, counted: bool = False) -> str:
    """dtype, head size, and powers of two not above the heads of all samples, the queries and the keys.

    `counted`: a length on the device says how many of the keys are valid.
    """
    sizes = (q.shape[0] * q.shape[2], q.shape[1], k.shape[1])
    heads, queries, keys = (1 << (max(n, 1).bit_length() - 1) for n in sizes)
    name = f"{str(dtype).removeprefix('torch.')} d{q.shape[3]} h{heads} q{queries} k{keys}"
    return name + COUNTED if counted else name


def choose(device: str, capability: tuple[int, int], entry: str, dtype: torch.dtype, work: int) -> str:
    """Name of the implementation for one shape class; `work` is queries * keys * heads of all samples."""
    measured = MEASURED.get(device, {}).get(entry)
    if measured in available():
        return measured
    large = work >= 2**26  # below it a launch costs more than the choice
    cudnn = COUNTING if entry.endswith(COUNTED) else "sdpa-cudnn"
    return cudnn if capability[0] == 9 and dtype in HALF and large and cudnn in available() else "triton"


def library_for(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
) -> Library | None:
    """The library that serves this call, or None: ours does."""
    dtype = values[0].dtype
    simple = len(keys) == 1 and mask is None and ropes[0] is None
    if not (simple and q.is_cuda and dtype in HALF and q.numel() and keys[0].numel()):
        return None
    device, capability = torch.cuda.get_device_name(q.device), torch.cuda.get_device_capability(q.device)
    work = q.shape[0] * q.shape[1] * q.shape[2] * keys[0].shape[1]
    counted = lengths[0] is not None
    name = choose(device, capability, shape_class(q, keys[0], dtype, counted), dtype, work)
    if name == COUNTING:
        return partial(attention_cudnn.attend, length=lengths[0])
    return LIBRARIES.get(name)


def measure(
    q: Tensor, k: Tensor, v: Tensor, ours: Library, timer: Callable[[Callable[[], object]], float]
) -> tuple[str, Mapping[str, float]]:
    """Time every available implementation on one call; the fastest name, and `timer`'s reading of each.

    An implementation that refuses the call is left out.
    """
    readings = {}
    for name in ("triton", *LIBRARIES):
        if name not in available():
            continue
        run = ours if name == "triton" else LIBRARIES[name]
        try:
            run(q, k, v)
            readings[name] = timer(lambda run=run: run(q, k, v))  # type: ignore[misc]
        except RuntimeError:
            continue
    return min(readings, key=lambda name: readings[name]), readings
