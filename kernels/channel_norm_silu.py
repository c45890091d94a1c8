"""Norm over channels with SiLU, what stands before every convolution of the video VAE.

    y = silu(x / max(|x|, 1e-12) * sqrt(C) * gamma)      |x|: L2 norm over the channels of one pixel

Shapes: x [B, C, ...] of any rank, gamma [C]; result like x, in `out_dtype` (default: the dtype of x).
Dtypes: float32 inside and one rounding of the result. Memory: the kernels read and write channels last; the result has
that layout. A pixel with NaN or Inf gives NaN in its own channels only. Gradients: x and gamma, deterministic.
Errors: ValueError when gamma has not one value a channel.  Source: wan.md, 2.1.2.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .cases import Case, Inputs, Op, randn
from .dispatch import fused, triton_runs

FLOOR = 1e-12
BACKWARD_PROGRAMS = 1024  # each sums its share of the gradient of gamma


def reference(x: Tensor, gamma: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    _check(x, gamma)
    wide = x.float()
    unit = wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(FLOOR)
    scaled = unit * x.shape[1] ** 0.5 * gamma.float().reshape(-1, *(1,) * (x.dim() - 2))
    return F.silu(scaled).to(out_dtype or x.dtype)


def _check(x: Tensor, gamma: Tensor) -> None:
    if gamma.numel() != x.shape[1]:
        raise ValueError(f"gamma has {gamma.numel()} values for {x.shape[1]} channels; one a channel is needed")


@triton.jit
def _forward(x_ptr, gamma_ptr, y_ptr, pixels, root, C: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, WIDTH)
    at = pixel[:, None] * C + channel[None, :]
    inside = (pixel[:, None] < pixels) & (channel[None, :] < C)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [PIXELS, WIDTH]
    gamma = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    norm = tl.where(norm < 1e-12, 1e-12, norm)  # keeps NaN
    s = x * (root / norm)[:, None] * gamma[None, :]
    y = s / (1.0 + tl.exp(-s))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr, x_ptr, gamma_ptr, dx_ptr, dgamma_ptr, pixels, root,
    C: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, WIDTH)
    gamma = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    dgamma = tl.zeros((WIDTH,), tl.float32)
    for first in range(tl.program_id(0) * PIXELS, pixels, tl.num_programs(0) * PIXELS):
        pixel = first + tl.arange(0, PIXELS).to(tl.int64)
        at = pixel[:, None] * C + channel[None, :]
        inside = (pixel[:, None] < pixels) & (channel[None, :] < C)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(x * x, 1))
        norm = tl.where(norm < 1e-12, 1e-12, norm)[:, None]
        unit = x / norm
        s = unit * root * gamma[None, :]
        gate = 1.0 / (1.0 + tl.exp(-s))
        ds = dy * gate * (1.0 + s * (1.0 - gate))
        dgamma += tl.sum(ds * unit, 0) * root
        du = ds * gamma[None, :] * root
        dx = (du - unit * tl.sum(du * unit, 1)[:, None]) / norm
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dgamma_ptr + tl.program_id(0) * C + channel, dgamma, mask=channel < C)


def _channels_last(x: Tensor) -> Tensor:
    """x [B, C, ...] -> dense [B, ..., C]: a view where x lies channels last already."""
    return x.movedim(1, -1).contiguous()


def _tile(channels: int) -> tuple[int, int]:
    """Pixels and padded channels of one program's tile."""
    width = triton.next_power_of_2(channels)
    return max(1, 4096 // width), width


@torch.library.custom_op("kinora::channel_norm_silu", mutates_args=())
def _op(x: Tensor, gamma: Tensor, out_dtype: torch.dtype) -> Tensor:
    if not triton_runs(x, gamma):
        return reference(x, gamma, out_dtype).contiguous()
    _check(x, gamma)
    rows = _channels_last(x)
    y = torch.empty_like(rows, dtype=out_dtype)
    channels = x.shape[1]
    pixels = rows.numel() // channels
    block, width = _tile(channels)
    _forward[(triton.cdiv(pixels, block),)](rows, gamma, y, pixels, channels**0.5, channels, block, width)
    return y.movedim(-1, 1)


@_op.register_fake
def _(x: Tensor, gamma: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x.movedim(1, -1), dtype=out_dtype, memory_format=torch.contiguous_format).movedim(-1, 1)


@torch.library.custom_op("kinora::channel_norm_silu_backward", mutates_args=())
def _backward_op(dy: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    if not triton_runs(dy, x, gamma):
        pair: Any = torch.func.vjp(lambda a, b: reference(a, b, dy.dtype), x, gamma)
        dx, dgamma = pair[1](dy)
        return dx.contiguous(), dgamma
    rows, grads = _channels_last(x), _channels_last(dy)
    dx = torch.empty_like(rows)
    channels = x.shape[1]
    pixels = rows.numel() // channels
    block, width = _tile(channels)
    block = max(1, block // 2)
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(pixels, block))
    parts = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    _backward[(programs,)](grads, rows, gamma, dx, parts, pixels, channels**0.5, channels, block, width)
    return dx.movedim(-1, 1), parts.sum(0).to(gamma.dtype).reshape(gamma.shape)


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return dx, torch.empty_like(gamma)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _pull(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_backward_op(dy, *ctx.saved_tensors), None)


_op.register_autograd(_pull, setup_context=_setup)


def channel_norm_silu(x: Tensor, gamma: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """SiLU of the channel norm of x [B, C, ...]; see the module docstring."""
    if fused(x, gamma):
        return _op(x, gamma, out_dtype or x.dtype)
    return reference(x, gamma, out_dtype)


def _case(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, small: bool = False) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        x = randn(*shape, device=device, generator=generator, dtype=dtype)
        gamma = 1.0 + randn(shape[1], device=device, generator=generator, scale=0.2)
        return {"x": x.contiguous(memory_format=torch.channels_last_3d), "gamma": gamma.to(dtype)}

    values = torch.Size(shape).numel()
    return Case(name, inputs, 0 if small else 8 * values, 0 if small else 4 * values, small)


def cases() -> list[Case]:
    """LiveAvatar's decoder, one block of 3 latent frames at 704x384; small awkward sizes."""
    return [
        _case("vae 96", 1, 96, 12, 384, 704),
        _case("vae 192", 1, 192, 12, 192, 352),
        _case("vae 384", 1, 384, 6, 96, 176),
        _case("one pixel", 1, 5, 1, 1, 1, dtype=torch.float32, small=True),
        _case("odd", 2, 24, 3, 5, 7, dtype=torch.float32, small=True),
        _case("bf16", 1, 32, 2, 4, 6, small=True),
    ]


OP = Op("channel_norm_silu", channel_norm_silu, reference, cases)
