"""3-D convolution that looks only into the past, with the past frames carried from chunk to chunk.

    y[t] = b + sum_{j < kt} w[:, :, j] * padded[t * st + j],   padded = [zeros | history | x]

Shapes: x [B, Cin, T, H, W]; weight [Cout, Cin, kt, kh, kw]; bias [Cout]; history [B, Cin, n, H, W] or None;
padding (pt, ph, pw) is the nominal one: ph and pw on both sides, 2 * pt frames in front and none behind. History
replaces the last n of those zero frames; with pt = 0 there is nothing to replace and it is ignored.
Dtypes: x is cast to the dtype of the weight. In half precision the float32 sum is rounded, then the bias is added
and the result rounded again, which is what the CUDA libraries do (wan.md, 2.1.12).
On the CPU one 2-D convolution per kernel frame is summed, with channels last in memory: PyTorch's 3-D convolution of
few frames is 3 to 10 times slower there. Results keep that layout (`torch.channels_last_3d`).
In half precision on a GPU, kernels of 1 or 3 frames and 1x1 or 3x3 pixels with stride 1 run in Triton
(`padded_conv3d`, which rounds once); the library does the rest. Gradients are the reference's.
NaN and Inf go into the pixels whose kernel window holds them.
Errors: ValueError when history has more than 2 * pt frames.  Source: wan.md, 2.1.1 and 2.1.6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conv3d_triton
from .cases import Case, Inputs, Op, randn
from .dispatch import autograd_by_reference, fused, triton_runs
from .linear import HALF
from .padded_conv3d import inner, pack_weight, padded_conv3d, ringed

Pair = tuple[int, int]
Triple = tuple[int, int, int]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, stride: int | Pair = 1, padding: int | Pair = 0) -> Tensor:
    """2-D convolution of frames [N, C, H, W] with the roundings of this file, in the dtype of the weight."""
    x = x.to(weight.dtype)
    if x.device.type != "cpu":
        return F.conv2d(x, weight, bias, stride, padding)
    x = x.contiguous(memory_format=torch.channels_last)
    if weight.dtype not in HALF:
        return F.conv2d(x, weight, bias, stride, padding)
    return F.conv2d(x.float(), weight.float(), None, stride, padding).to(weight.dtype) + bias[:, None, None]


def next_history(x: Tensor, history: Tensor | None, frames: int = 2) -> Tensor:
    """The last `frames` frames of [zeros | history | x], as a tensor of its own (never a view of a large x)."""
    if x.shape[2] >= frames:
        return x[:, :, -frames:].clone()
    return _with_past(x, history, frames)[:, :, -frames:].clone()


def _with_past(x: Tensor, history: Tensor | None, frames: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C, frames + T, H, W]: history in front, zeros before it."""
    known = 0 if history is None else history.shape[2]
    if known > frames:
        raise ValueError(f"history has {known} frames, this convolution looks back {frames}; pass the last {frames}")
    if history is None:
        return F.pad(x, (0, 0, 0, 0, frames, 0)) if frames else x
    if known < frames:
        history = F.pad(history, (0, 0, 0, 0, frames - known, 0))
    return torch.cat((history.to(x.dtype), x), 2)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None = None,
    stride: Triple = (1, 1, 1),
    padding: Triple = (1, 1, 1),
) -> Tensor:
    past, space = 2 * padding[0], (0, *padding[1:])
    padded = _with_past(x.to(weight.dtype), history if past else None, past)
    if weight.dtype in HALF and x.device.type == "cpu":
        total = F.conv3d(padded.float(), weight.float(), None, stride, space).to(weight.dtype)
        return total + bias[:, None, None, None]
    return F.conv3d(padded, weight, bias, stride, space)


def _sum_of_frames(
    x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None, stride: Triple, padding: Triple
) -> Tensor:
    past, half = 2 * padding[0], weight.dtype in HALF
    x = x.to(weight.dtype).contiguous(memory_format=torch.channels_last_3d)
    padded = _with_past(x, history if past else None, past)
    frames = padded.permute(0, 2, 3, 4, 1)  # [B, T, H, W, Cin]
    reach = (frames.shape[1] - weight.shape[2]) // stride[0] * stride[0] + 1
    total: Tensor | None = None
    for i, kernel in enumerate((weight.float() if half else weight).unbind(2)):
        part = frames[:, i : i + reach : stride[0]].flatten(0, 1).contiguous()  # [B * T', H, W, Cin]
        part = part.permute(0, 3, 1, 2).to(kernel.dtype)
        part = F.conv2d(part, kernel, None if half or i else bias, stride[1:], padding[1:])
        total = part if total is None else total.add_(part)
    assert total is not None
    if half:
        total = total.to(weight.dtype) + bias[:, None, None]
    return total.unflatten(0, (x.shape[0], -1)).transpose(1, 2)  # [B, Cout, T', H', W']


def _plain(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None, stride: Triple, padding: Triple) -> Tensor:
    compute = _sum_of_frames if x.device.type == "cpu" else reference
    return compute(x, weight, bias, history, stride, padding)


def _kernel_knows(weight: Tensor, stride: Triple, padding: Triple) -> bool:
    """Whether `padded_conv3d` computes this convolution, on this device in this dtype."""
    kt, *space = weight.shape[2:]
    same = tuple(padding[1:]) == tuple(k // 2 for k in space)
    return tuple(stride) == (1, 1, 1) and kt in (1, 3) and space in ([1, 1], [3, 3]) and same


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None, past: int, out: Tensor) -> None:
    """Copy history and x behind each other into a ringed buffer and convolve that into out [B, T', H, W, Cout]."""
    batch, channels_in, frames, height, width = x.shape
    known = 0 if history is None else history.shape[2]
    aligned = -(-channels_in // 16) * 16  # the kernel wants 16 channels
    buffer = ringed(batch, past + frames, height, width, aligned, like=weight)
    body = inner(buffer)[..., :channels_in]  # [B, past + T, H, W, Cin]
    body[:, past:].copy_(x.permute(0, 2, 3, 4, 1))
    if history is not None and known:
        body[:, past - known : past].copy_(history.permute(0, 2, 3, 4, 1))
    padded_conv3d(buffer, pack_weight(weight, aligned), bias, raw=out)


def _result(x: Tensor, weight: Tensor, stride: Triple, padding: Triple) -> Tensor:
    """An empty result [B, T', H', W', Cout]."""
    before = (2 * padding[0], 2 * padding[1], 2 * padding[2])
    sizes = (
        (size + pad - kernel) // step + 1
        for size, pad, kernel, step in zip(x.shape[2:], before, weight.shape[2:], stride, strict=True)
    )
    return weight.new_empty(x.shape[0], *sizes, weight.shape[0])


@torch.library.custom_op("kinora::causal_conv3d", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    steps, pads = (stride[0], stride[1], stride[2]), (padding[0], padding[1], padding[2])
    past = 2 * pads[0]
    if not past:
        history = None
    elif history is not None and history.shape[2] > past:
        raise ValueError(
            f"history has {history.shape[2]} frames, this convolution looks back {past}; pass the last {past}"
        )
    out = _result(x, weight, steps, pads)
    if triton_runs(x) and _kernel_knows(weight, steps, pads) and conv3d_triton.takes(weight):
        _by_kernel(x, weight, bias, history, past, out)
    else:
        out.copy_(_plain(x, weight, bias, history, steps, pads).permute(0, 2, 3, 4, 1))
    return out.permute(0, 4, 1, 2, 3)


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    steps, pads = (stride[0], stride[1], stride[2]), (padding[0], padding[1], padding[2])
    return _result(x, weight, steps, pads).permute(0, 4, 1, 2, 3)


autograd_by_reference(_op, reference)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None = None,
    stride: Triple = (1, 1, 1),
    padding: Triple = (1, 1, 1),
) -> Tensor:
    """Causal convolution [B, Cin, T, H, W] -> [B, Cout, T', H', W']; see the module docstring."""
    if fused(x, weight):
        return _op(x, weight, bias, history, list(stride), list(padding))
    return _plain(x, weight, bias, history, stride, padding)


def _case(
    name: str,
    channels: tuple[int, int],
    frames: int,
    size: tuple[int, int],
    kernel: Triple = (3, 3, 3),
    stride: Triple = (1, 1, 1),
    history: int = 2,
    batch: int = 1,
    small: bool = False,
) -> Case:
    channels_in, channels_out = channels
    taps = torch.Size(kernel).numel()

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        dtype = torch.float32 if small else torch.bfloat16

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return randn(*shape, device=device, generator=generator, dtype=dtype, scale=scale)

        return {
            "x": draw(batch, channels_in, frames, *size).contiguous(memory_format=torch.channels_last_3d),
            "weight": draw(channels_out, channels_in, *kernel, scale=(channels_in * taps) ** -0.5),
            "bias": draw(channels_out),
            "history": draw(batch, channels_in, history, *size) if history else None,
            "stride": stride,
            "padding": (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2),
        }

    pixels = batch * frames * size[0] * size[1]
    flops = 2 * pixels * channels_in * channels_out * taps
    moved = 2 * (pixels * (channels_in + channels_out) + channels_in * channels_out * taps)
    return Case(name, inputs, 0 if small else flops, 0 if small else moved, small, 1e-5 if small else 1e-2)


def cases() -> list[Case]:
    """LiveAvatar's decoder, one block of 3 latent frames at 704x384; small ones of every kind of kernel."""
    return [
        _case("level3", (96, 96), 12, (704, 384)),
        _case("level2", (192, 192), 12, (352, 192)),
        _case("level1", (384, 384), 6, (176, 96)),
        _case("head", (96, 3), 12, (704, 384)),
        _case("small", (5, 7), 3, (5, 4), batch=2, small=True),
        _case("small_first", (16, 3), 1, (3, 3), history=0, small=True),
        _case("small_one_known", (4, 16), 2, (1, 5), history=1, small=True),
        _case("small_time", (6, 12), 2, (4, 3), (3, 1, 1), small=True),
        _case("small_space", (6, 4), 2, (4, 3), (1, 3, 3), history=0, small=True),
        _case("small_point", (6, 4), 2, (4, 3), (1, 1, 1), history=0, small=True),
        _case("small_stride", (4, 4), 3, (4, 6), stride=(1, 2, 2), small=True),
    ]


OP = Op("causal_conv3d", causal_conv3d, reference, cases)
