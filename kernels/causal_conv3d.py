"""3-D convolution that looks only into the past, with the past frames carried from chunk to chunk.

    y[t] = b + sum_{j < kt} w[:, :, j] * padded[t * st + j],   padded = [zeros | history | x]

Shapes: x [B, Cin, T, H, W]; weight [Cout, Cin, kt, kh, kw]; bias [Cout]; history [B, Cin, n, H, W] or None;
padding (pt, ph, pw) is the nominal one: ph and pw on both sides, 2 * pt frames in front and none behind. History
replaces the last n of those zero frames; with pt = 0 there is nothing to replace and it is ignored.
Dtypes: x is cast to the dtype of the weight. In half precision the float32 sum is rounded, then the bias is added
and the result rounded again, which is what the CUDA libraries do (wan.md, 2.1.12).
On the CPU one 2-D convolution per kernel frame is summed, with channels last in memory: PyTorch's 3-D convolution of
few frames is 3 to 10 times slower there. Results keep that layout (`torch.channels_last_3d`).
Errors: ValueError when history has more than 2 * pt frames.  Source: wan.md, 2.1.1 and 2.1.6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import HALF

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


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None = None,
    stride: Triple = (1, 1, 1),
    padding: Triple = (1, 1, 1),
) -> Tensor:
    """Causal convolution [B, Cin, T, H, W] -> [B, Cout, T', H', W']; see the module docstring."""
    compute = _sum_of_frames if x.device.type == "cpu" else reference
    return compute(x, weight, bias, history, stride, padding)


def cases() -> list[dict[str, int]]:
    """LiveAvatar's decoder, one block of 3 latent frames at 704x384: wide late layers, a middle one, the head."""
    return [
        {"channels_in": 96, "channels_out": 96, "frames": 12, "height": 384, "width": 704},
        {"channels_in": 192, "channels_out": 192, "frames": 12, "height": 192, "width": 352},
        {"channels_in": 384, "channels_out": 384, "frames": 6, "height": 96, "width": 176},
        {"channels_in": 96, "channels_out": 3, "frames": 12, "height": 384, "width": 704},
    ]
