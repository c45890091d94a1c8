"""When the Hopper kernel (`attention_hopper_kernel`) serves a call of attention, and its launch.

It reads queries, keys and values by TMA, through tensor maps over the buffers as they lie, so that a call qualifies by
its strides: the channels of all heads side by side, rows and first bytes at multiples of 16 bytes. What does not
qualify goes to the portable Triton kernels. Gluon is part of Triton and is imported at the first call.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .attention_forward import LOG2E
from .attention_merge import merge
from .linear import HALF

HEAD_DIM = 128
ROWS, KEYS = 64, 128
"""Queries of a warpgroup and keys of a tile, as in the kernel."""
LEAST_KEYS = 1024
"""Fewer are not measured; and Triton 3.6 fails to compile the kernel for one FP8 segment of a single row."""
E4M3 = torch.float8_e4m3fn


@cache
def available(device: torch.device) -> bool:
    """Whether this device is a Hopper GPU and the installed Triton has Gluon for it."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from . import attention_hopper_kernel  # noqa: F401
    except (ImportError, AttributeError):  # a Triton without Gluon, or whose Gluon has other names
        return False
    return True


def serves_fp8(
    q8: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    descales: Sequence[Tensor | None],
    slots: Sequence[int],
) -> bool:
    """Arguments as in the op `kinora::attention_fp8`."""
    return (
        available(q8.device)
        and q8.shape[3] == HEAD_DIM
        and len(keys) <= 2
        and sum(k.shape[1] for k in keys) >= LEAST_KEYS
        and all(d is not None and d.is_contiguous() for d in descales)
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (*keys, *values))
        and all(stride % KEYS == 0 for stride in slots[2::3])
    )


def serves_half(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    mask: Tensor | None,
) -> bool:
    """Arguments as in the op `kinora::rope_attention`."""
    return (
        available(q.device)
        and q.shape[3] == HEAD_DIM
        and len(keys) <= 2
        and sum(k.shape[1] for k in keys) >= LEAST_KEYS
        and mask is None
        and all(rope is None for rope in ropes)
        and q.dtype in HALF
        and all(t.dtype == q.dtype and t.numel() > 0 and has_map(t) for t in (q, *keys, *values))
    )


def has_map(x: Tensor) -> bool:
    """Whether a tensor map [B, L, H * d] describes x [B, L, H, d]."""
    side_by_side = x.stride(3) == 1 and (x.stride(2) == x.shape[3] or x.shape[2] == 1)
    return side_by_side and all(n * x.element_size() % 16 == 0 for n in x.stride()[:2]) and x.data_ptr() % 16 == 0


def _rows_map(x: Tensor, rows: int) -> Any:
    """Tiles [1, rows, d] of x [B, L, H, d]."""
    batch, length, heads, d = x.shape
    return _tensor_map(x, [batch, length, heads * d], [x.stride(0), x.stride(1), 1], [1, rows, d])


def _keys_map(k8: Tensor) -> Any:
    """Tiles [8, 2, 4, 2, d] of k8 [B, S, H, d]: row 8j + 2t + b of sixteen is 4t + 2j + b (see `to_operand`)."""
    batch, length, heads, d = k8.shape
    row = heads * d
    return _tensor_map(k8, [batch * length // 16, 2, 4, 2, row], [16 * row, 2 * row, 4 * row, row, 1], [8, 2, 4, 2, d])


def _values_map(v8: Tensor) -> Any:
    """Tiles [d, KEYS] of v8 [B, H, d, S]."""
    batch, heads, d, length = v8.shape
    return _tensor_map(v8, [batch * heads * d, length], [length, 1], [d, KEYS])


def _tensor_map(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = {E4M3: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    return TensorDescriptor(x, shape, strides, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def forward_fp8(
    q8: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    descales: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    qk_descale: Tensor,
    slots: Sequence[int],
) -> Tensor:
    """Arguments and result of the op `kinora::attention_fp8`, where `serves_fp8` accepts."""
    out = torch.empty(q8.shape, dtype=torch.bfloat16, device=q8.device)
    maps = [m for k, v in zip(keys, values, strict=True) for m in (_keys_map(k), _values_map(v))]
    layouts = [tuple(slots[i : i + 3]) for i in range(0, len(slots), 3)]
    _launch(q8.contiguous(), maps, lengths, descales, qk_descale, out, None, layouts)
    return out


def forward_half(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Attention [B, Lq, H, d] in the dtype of q and the log-sum-exp, float32 [B, H, Lq], where `serves_half` accepts.

    `lengths`: valid rows of each segment, one integer on the device, or None for all.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    maps = [_rows_map(x, KEYS) for pair in zip(keys, values, strict=True) for x in pair]
    layouts = [(1, k.shape[1], k.shape[1]) for k in keys]
    _launch(q, maps, lengths, [None] * len(keys), None, out, lse, layouts)
    return out, lse


def _launch(
    q: Tensor,
    maps: list[Any],
    lengths: Sequence[Tensor | None],
    descales: Sequence[Tensor | None],
    qk_descale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    layouts: Sequence[tuple[int, ...]],
) -> None:
    """`layouts`: slots, their rows and their padded rows, of each segment."""
    from .attention_hopper_kernel import hopper_kernel

    batch, queries, heads, d = q.shape
    groups, stages = (3, 4) if q.dtype == E4M3 else (2, 2)
    tiles = batch * heads * -(-queries // (groups * ROWS))
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    rest = tiles % programs
    part = peak = None
    if rest:
        part = torch.empty((2 * programs, groups * ROWS, d), dtype=torch.float32, device=q.device)
        peak = torch.empty((2 * programs, groups * ROWS, 2), dtype=torch.float32, device=q.device)
    absent = [None] * (2 - len(layouts))
    hopper_kernel[(programs,)](
        _rows_map(q, ROWS),
        *maps,
        *absent * 2,
        *lengths,
        *absent,
        *descales,
        *absent,
        qk_descale,
        out,
        lse,
        part,
        peak,
        *layouts,
        *[(0, 1, 0) for _ in absent],
        queries,
        heads,
        tiles,
        d**-0.5 * LOG2E.value,
        GROUPS=groups,
        STAGES=stages,
        num_warps=4,
    )
    if part is not None and peak is not None:
        merge(part, peak, out, lse, tiles, rest)
