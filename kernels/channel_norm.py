"""Residual sum, RMS norm over channels and SiLU, from and into frames that lie anywhere in memory, channels last.

    s = x + residual;   raw <- s;   normed <- silu(s / max(|s|, 1e-12) * sqrt(C) * gamma)

Shapes: x, residual, raw, normed [B, T, H, W, C] with channels next to each other, all other strides free (frames
inside zero-ringed buffers, for example); gamma [C]. One of raw and normed may be None; without `silu` the norm is
written as it is. raw may be x or residual itself.
Dtypes: the sum and the norm are computed in float32 and rounded once, where they are stored.
A pixel with NaN or Inf makes its own channels NaN (raw keeps them as they are), no other pixel.
Errors: ValueError for shapes that differ, channels apart in memory, or nothing to write.
Source: wan.md, 2.1.2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .cases import Case, Inputs, Op, randn
from .dispatch import fused, triton_runs


def norm_of(s: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """The formula on float32 [..., C]."""
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True).clamp_min(1e-12)
    y = s / norm * s.shape[-1] ** 0.5 * gamma.float()
    return F.silu(y) if silu else y


def reference(
    x: Tensor,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    raw: Tensor | None = None,
    normed: Tensor | None = None,
    silu: bool = True,
) -> None:
    s = x.float() if residual is None else x.float() + residual.float()
    if normed is not None:
        assert gamma is not None
        normed.copy_(norm_of(s, gamma, silu))
    if raw is not None:
        raw.copy_(s)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _norm_kernel(
    x,
    gamma,
    residual,
    raw,
    normed,
    x_strides,  # of batch, frame, row, column, in elements
    residual_strides,
    raw_strides,
    normed_strides,
    frames,
    height,
    width,
    C: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    frame = tl.program_id(1) % frames
    entry = (tl.program_id(1) // frames).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    h = (pixel // width).to(tl.int64)[:, None]
    w = (pixel % width)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    kept = (pixel < height * width)[:, None] & (c < C)
    base = entry * x_strides[0] + frame * x_strides[1]
    s = tl.load(x + base + h * x_strides[2] + w * x_strides[3] + c, mask=kept, other=0.0).to(tl.float32)
    if residual is not None:
        base = entry * residual_strides[0] + frame * residual_strides[1]
        at = base + h * residual_strides[2] + w * residual_strides[3] + c
        s += tl.load(residual + at, mask=kept, other=0.0).to(tl.float32)
    if raw is not None:
        base = entry * raw_strides[0] + frame * raw_strides[1]
        tl.store(raw + base + h * raw_strides[2] + w * raw_strides[3] + c, s.to(raw.dtype.element_ty), mask=kept)
    if normed is not None:
        scale = tl.sqrt(C * 1.0) / tl.maximum(tl.sqrt(tl.sum(s * s, 1)), 1e-12)
        y = s * scale[:, None] * tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        base = entry * normed_strides[0] + frame * normed_strides[1]
        at = base + h * normed_strides[2] + w * normed_strides[3] + c
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=kept)


def _launch(
    x: Tensor, gamma: Tensor | None, residual: Tensor | None, raw: Tensor | None, normed: Tensor | None, silu: bool
) -> None:
    batch, frames, height, width, channels = x.shape
    block_c = triton.next_power_of_2(channels)
    block_p = max(4096 // block_c, 1)

    def strides(view: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0, 0) if view is None else view.stride()[:4]

    _norm_kernel[(triton.cdiv(height * width, block_p), batch * frames)](
        x,
        gamma,
        residual,
        raw,
        normed,
        strides(x),
        strides(residual),
        strides(raw),
        strides(normed),
        frames,
        height,
        width,
        C=channels,
        SILU=silu,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=4,
    )


@torch.library.custom_op("kinora::channel_norm", mutates_args=("raw", "normed"))
def _op(
    x: Tensor, gamma: Tensor | None, residual: Tensor | None, raw: Tensor | None, normed: Tensor | None, silu: bool
) -> None:
    if triton_runs(x):
        _launch(x, gamma, residual, raw, normed, silu)
    else:
        reference(x, gamma, residual, raw, normed, silu)


@_op.register_fake
def _(
    x: Tensor, gamma: Tensor | None, residual: Tensor | None, raw: Tensor | None, normed: Tensor | None, silu: bool
) -> None:
    return None


def check_views(shape: Sequence[int], **views: Tensor | None) -> None:
    """ValueError unless each view has this shape and its channels next to each other."""
    for name, view in views.items():
        if view is None:
            continue
        if tuple(view.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(view.shape)}; {tuple(shape)} is needed")
        if view.shape[-1] > 1 and view.stride(-1) != 1:
            raise ValueError(f"{name} has its channels {view.stride(-1)} elements apart; lay channels last in memory")


def check_outputs(channels: int, gamma: Tensor | None, raw: Tensor | None, normed: Tensor | None) -> None:
    """ValueError unless something is written and a norm has its weights."""
    if raw is None and normed is None:
        raise ValueError("nothing to write: pass raw, normed or both")
    if normed is not None and (gamma is None or gamma.shape != (channels,)):
        given = None if gamma is None else tuple(gamma.shape)
        raise ValueError(f"normed needs gamma with one weight a channel ({channels}), it is {given}")


def channel_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    raw: Tensor | None = None,
    normed: Tensor | None = None,
    silu: bool = True,
) -> None:
    """Write the sum into `raw` and its norm into `normed`; see the module docstring. Not differentiable."""
    if x.dim() != 5:
        raise ValueError(f"x has shape {tuple(x.shape)}; [batch, frames, rows, columns, channels] is needed")
    check_views(x.shape, x=x, residual=residual, raw=raw, normed=normed)
    check_outputs(x.shape[-1], gamma, raw, normed)
    compute = _op if fused(x) else reference
    compute(x, gamma, residual, raw, normed, silu)


def _case(name: str, shape: tuple[int, ...], half: bool = True) -> Case:
    channels = shape[-1]

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        dtype = torch.bfloat16 if half else torch.float32

        def frames() -> Tensor:
            full = randn(*shape[:2], shape[2] + 2, shape[3] + 2, channels, device=device, generator=generator)
            return full.to(dtype)[:, :, 1:-1, 1:-1]

        gamma = randn(channels, device=device, generator=generator)
        return {"x": frames(), "gamma": gamma, "residual": frames(), "raw": frames(), "normed": frames()}

    size = 2 * torch.Size(shape).numel()
    return Case(name, inputs, flops=0, bytes=4 * size if half else 0, small=not half)


def cases() -> list[Case]:
    """Levels of LiveAvatar's decoder, 12 frames at 704x384; small frames with a tail in every direction."""
    return [
        _case("level3", (1, 12, 704, 384, 96)),
        _case("level2", (1, 12, 352, 192, 192)),
        _case("level1", (1, 6, 176, 96, 384)),
        _case("small", (2, 3, 5, 7, 24), half=False),
        _case("one_pixel", (1, 1, 1, 1, 3), half=False),
    ]


OP = Op("channel_norm", channel_norm, reference, cases, mutates=("raw", "normed"), differentiable=False)
