"""RMS norm over channels and SiLU, what stands before every convolution of the video VAE.

    norm(s) = s / max(|s|, 1e-12) * sqrt(C) * gamma        |s|: L2 norm over the channels of one pixel
    channel_norm(x, gamma, residual, raw, normed):  s = x + residual;  raw <- s;  normed <- silu(norm(s))
    channel_norm_silu(x, gamma) = silu(norm(x))

`channel_norm` writes into frames that lie anywhere in memory (inside zero-ringed buffers, for example): x, residual,
raw, normed [B, T, H, W, C] with channels next to each other and all other strides free; gamma [C]. One of raw and
normed may be None; without `silu` the norm is written as it is. raw may be x or residual itself. Not differentiable.
`channel_norm_silu` is the function for modules: x [B, C, ...] of any rank, gamma [C]; result like x in `out_dtype`
(default: the dtype of x), channels last in memory on a GPU. Gradients: x and gamma, deterministic.
Dtypes: everything in float32 and one rounding, where a result is stored.
A NaN makes all channels of its pixel NaN, an infinity itself NaN and the others zero (raw keeps both as they are); no
other pixel is touched.
Errors: ValueError for shapes that do not fit, channels apart in memory, or nothing to write.
Source: wan.md, 2.1.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .cases import Case, Inputs, Op, randn
from .dispatch import fused, triton_runs
from .launch import launched

FLOOR = tl.constexpr(1e-12)
BACKWARD_PROGRAMS = 1024  # each sums its share of the gradient of gamma


def norm_of(s: Tensor, gamma: Tensor, silu: bool, dim: int = -1) -> Tensor:
    """The formula on float32 s whose channels are axis `dim`; gamma broadcasts with s."""
    norm = torch.linalg.vector_norm(s, dim=dim, keepdim=True).clamp_min(FLOOR.value)
    y = s / norm * s.shape[dim] ** 0.5 * gamma.float()
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


def silu_reference(x: Tensor, gamma: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    _check_gamma(x, gamma)
    column = gamma.reshape(-1, *(1,) * (x.dim() - 2))
    return norm_of(x.float(), column, silu=True, dim=1).to(out_dtype or x.dtype)


@triton.jit
def _length(s):
    """L2 norm of the channels of each pixel, s [P, C] -> [P], at least the floor; keeps NaN."""
    norm = tl.sqrt(tl.sum(s * s, 1))
    return tl.where(norm < FLOOR, FLOOR, norm)


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
    frame = (tl.program_id(1) % frames).to(tl.int64)
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
        scale = tl.sqrt(C * 1.0) / _length(s)
        y = s * scale[:, None] * tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        base = entry * normed_strides[0] + frame * normed_strides[1]
        at = base + h * normed_strides[2] + w * normed_strides[3] + c
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=kept)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, gamma_ptr, dx_ptr, dgamma_ptr, pixels, root,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of silu(norm(x)) on dense rows [P, C]; `dgamma` is the sum of one program, [programs, C]."""
    channel = tl.arange(0, BLOCK_C)
    gamma = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    dgamma = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_P, pixels, tl.num_programs(0) * BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P).to(tl.int64)
        at = pixel[:, None] * C + channel[None, :]
        inside = (pixel[:, None] < pixels) & (channel[None, :] < C)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        norm = _length(x)[:, None]
        unit = x / norm
        s = unit * root * gamma[None, :]
        gate = 1.0 / (1.0 + tl.exp(-s))
        ds = dy * gate * (1.0 + s * (1.0 - gate))
        dgamma += tl.sum(ds * unit, 0) * root
        du = ds * gamma[None, :] * root
        dx = (du - unit * tl.sum(du * unit, 1)[:, None]) / norm
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dgamma_ptr + tl.program_id(0) * C + channel, dgamma, mask=channel < C)


def _blocks(channels: int) -> tuple[int, int]:
    """Padded channels and pixels of one program's tile."""
    block_c = triton.next_power_of_2(channels)
    return block_c, max(4096 // block_c, 1)


def launch(
    x: Tensor, gamma: Tensor | None, residual: Tensor | None, raw: Tensor | None, normed: Tensor | None, silu: bool
) -> None:
    """`channel_norm` in Triton, arguments checked before."""
    batch, frames, height, width, channels = x.shape
    block_c, block_p = _blocks(channels)

    def strides(view: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0, 0) if view is None else view.stride()[:4]

    launched(_norm_kernel)[(triton.cdiv(height * width, block_p), batch * frames)](
        x,
        None if gamma is None else gamma.contiguous(),
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


# channel_norm: into given memory


@torch.library.custom_op("kinora::channel_norm", mutates_args=("raw", "normed"))
def _op(
    x: Tensor, gamma: Tensor | None, residual: Tensor | None, raw: Tensor | None, normed: Tensor | None, silu: bool
) -> None:
    if triton_runs(x):
        launch(x, gamma, residual, raw, normed, silu)
    else:
        reference(x, gamma, residual, raw, normed, silu)


_op.register_fake(lambda *_: None)


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


# channel_norm_silu: a function with gradients


def _check_gamma(x: Tensor, gamma: Tensor) -> None:
    if x.dim() < 2 or gamma.shape != (x.shape[1],):
        raise ValueError(f"gamma {tuple(gamma.shape)} for x {tuple(x.shape)}: x [B, C, ...] needs one weight a channel")


def _channels_last(x: Tensor) -> Tensor:
    """x [B, C, ...] -> dense [B, ..., C]: a view where x lies channels last already."""
    return x.movedim(1, -1).contiguous()


@torch.library.custom_op("kinora::channel_norm_silu", mutates_args=())
def _silu_op(x: Tensor, gamma: Tensor, out_dtype: torch.dtype) -> Tensor:
    if not triton_runs(x, gamma):
        return _channels_last(silu_reference(x, gamma, out_dtype)).movedim(-1, 1)
    _check_gamma(x, gamma)
    rows = _channels_last(x)
    y = torch.empty_like(rows, dtype=out_dtype)
    if rows.numel():
        column = (1, 1, -1, 1, x.shape[1])  # pixels as rows of one column
        launch(rows.view(column), gamma, None, None, y.view(column), silu=True)
    return y.movedim(-1, 1)


@_silu_op.register_fake
def _(x: Tensor, gamma: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x.movedim(1, -1), dtype=out_dtype, memory_format=torch.contiguous_format).movedim(-1, 1)


@torch.library.custom_op("kinora::channel_norm_silu_backward", mutates_args=())
def _silu_backward_op(dy: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    if not triton_runs(dy, x, gamma):
        _, pull = torch.func.vjp(lambda a, b: silu_reference(a, b, dy.dtype), x, gamma)[:2]
        dx, dgamma = pull(dy)
        return _channels_last(dx).movedim(-1, 1), dgamma
    rows, grads = _channels_last(x), _channels_last(dy)
    dx = torch.empty_like(rows)
    channels = x.shape[1]
    pixels = rows.numel() // channels
    block_c, block_p = _blocks(channels)
    block_p = max(1, block_p // 2)  # twice as many values live in registers
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(pixels, block_p))
    parts = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    if programs:
        _backward_kernel[(programs,)](
            grads, rows, gamma.contiguous(), dx, parts, pixels, channels**0.5, channels, block_c, block_p
        )
    return dx.movedim(-1, 1), parts.sum(0).to(gamma.dtype)


@_silu_backward_op.register_fake
def _(dy: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return dx, torch.empty_like(gamma, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _pull(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_silu_backward_op(dy, *ctx.saved_tensors), None)


_silu_op.register_autograd(_pull, setup_context=_setup)


def channel_norm_silu(x: Tensor, gamma: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """SiLU of the channel norm of x [B, C, ...]; see the module docstring."""
    if fused(x, gamma):
        return _silu_op(x, gamma, out_dtype or x.dtype)
    return silu_reference(x, gamma, out_dtype)


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


def _silu_case(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, small: bool = False) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        x = randn(*shape, device=device, generator=generator, dtype=dtype)
        gamma = 1.0 + randn(shape[1], device=device, generator=generator, scale=0.2)
        return {"x": x.movedim(1, -1).contiguous().movedim(-1, 1), "gamma": gamma.to(dtype)}

    values = torch.Size(shape).numel()
    return Case(name, inputs, 0 if small else 8 * values, 0 if small else 4 * values, small)


def silu_cases() -> list[Case]:
    """LiveAvatar's decoder, one block of 3 latent frames at 704x384; small awkward sizes and ranks."""
    return [
        _silu_case("vae 96", 1, 96, 12, 384, 704),
        _silu_case("vae 192", 1, 192, 12, 192, 352),
        _silu_case("vae 384", 1, 384, 6, 96, 176),
        _silu_case("one pixel", 1, 5, 1, 1, 1, dtype=torch.float32, small=True),
        _silu_case("odd", 2, 24, 3, 5, 7, dtype=torch.float32, small=True),
        _silu_case("rows", 7, 40, dtype=torch.float32, small=True),
        _silu_case("bf16", 1, 32, 2, 4, 6, small=True),
    ]


OP = Op("channel_norm", channel_norm, reference, cases, mutates=("raw", "normed"), differentiable=False)
SILU_OP = Op("channel_norm_silu", channel_norm_silu, silu_reference, silu_cases)
