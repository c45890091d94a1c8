"""The last step of a 3x3 convolution to few channels whose nine taps were computed as output channels.

    out[b, c, t, h, w] = bias[c] + sum_{dh, dw} partial[b, t, h + dh, w + dw, (3 dh + dw) C + c]

A convolution to 3 channels keeps no tensor core busy and reads its input once a tap. As a product with 27 output
channels it reads it once; what is left is this sum over neighbours.
Shapes: partial [B, T, H + 2, W + 2, >= 9 C], zeros in the outermost rows and columns (copied where channels do not
lie side by side); bias [C]; out [B, C, T, H, W], any strides. `bound`: clamp to [-bound, bound], None: do not (NaN
stays NaN).
Dtypes: summed in float32, rounded once to the dtype of out.
Errors: ValueError for shapes that do not fit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import Case, Inputs, Op, randn
from .dispatch import fused, triton_runs
from .rows import row_major


def tap_weight(weight: Tensor) -> Tensor:
    """[C, Cin, kt, 3, 3] -> [9 C, Cin, kt, 1, 1]: the weight whose product is `partial`."""
    return weight.permute(3, 4, 0, 1, 2).flatten(0, 2)[..., None, None]


def reference(partial: Tensor, bias: Tensor, out: Tensor, bound: float | None = None) -> None:
    channels, height, width = len(bias), out.shape[3], out.shape[4]
    total = bias.float()
    for tap in range(9):
        rows, columns = slice(tap // 3, tap // 3 + height), slice(tap % 3, tap % 3 + width)
        total = total + partial[:, :, rows, columns, tap * channels : (tap + 1) * channels].float()
    total = total.permute(0, 4, 1, 2, 3)
    out.copy_(total if bound is None else total.clamp(-bound, bound))


@triton.jit(do_not_specialize=["frames", "width"])
def _gather_kernel(
    partial,
    bias,
    out,
    partial_strides,  # of batch, frame, row, column, in elements
    out_strides,  # of batch, channel, frame, row, column
    frames,
    width,
    bound,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    h = tl.program_id(1)
    frame = tl.program_id(2) % frames
    entry = (tl.program_id(2) // frames).to(tl.int64)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    kept = (w < width) & (c < C)
    total = tl.zeros([BLOCK_W, BLOCK_C], tl.float32) + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    base = partial + entry * partial_strides[0] + frame.to(tl.int64) * partial_strides[1]
    for tap in tl.static_range(9):
        at = (h + tap // 3) * partial_strides[2] + (w + tap % 3) * partial_strides[3] + tap * C + c
        total += tl.load(base + at, mask=kept, other=0.0).to(tl.float32)
    if bound is not None:
        total = tl.where(total == total, tl.minimum(tl.maximum(total, -bound), bound), total)
    at = entry * out_strides[0] + frame.to(tl.int64) * out_strides[2] + h * out_strides[3]
    at = at + c.to(tl.int64) * out_strides[1] + w * out_strides[4]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=kept)


@torch.library.custom_op("kinora::gather_taps", mutates_args=("out",))
def _op(partial: Tensor, bias: Tensor, out: Tensor, bound: float | None) -> None:
    if not triton_runs(partial):
        return reference(partial, bias, out, bound)
    batch, channels, frames, height, width = out.shape
    partial = row_major(partial)
    block_w = min(triton.next_power_of_2(width), 128)
    _gather_kernel[(triton.cdiv(width, block_w), height, batch * frames)](
        partial,
        bias.contiguous(),
        out,
        partial.stride()[:4],
        out.stride(),
        frames,
        width,
        bound,
        C=channels,
        BLOCK_C=triton.next_power_of_2(channels),
        BLOCK_W=block_w,
        num_warps=4,
    )
    return None


_op.register_fake(lambda *_: None)


def gather_taps(partial: Tensor, bias: Tensor, out: Tensor, bound: float | None = None) -> None:
    """Sum the nine taps of every pixel into `out`; see the module docstring. Not differentiable."""
    batch, channels, frames, height, width = out.shape
    wanted = (batch, frames, height + 2, width + 2)
    if partial.shape[:4] != wanted or partial.shape[4] < 9 * channels or bias.shape != (channels,):
        raise ValueError(
            f"out of shape {tuple(out.shape)} needs partial {wanted} with {9 * channels} channels and bias "
            f"({channels},); they are {tuple(partial.shape)} and {tuple(bias.shape)}"
        )
    compute = _op if fused(partial) else reference
    compute(partial, bias, out, bound)


def _case(name: str, shape: tuple[int, int, int, int, int], bound: float | None, small: bool) -> Case:
    batch, channels, frames, height, width = shape

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        partial = torch.zeros(batch, frames, height + 2, width + 2, -(-9 * channels // 8) * 8, device=device)
        values = randn(batch, frames, height, width, partial.shape[-1], device=device, generator=generator)
        partial[:, :, 1:-1, 1:-1] = values
        bias = randn(channels, device=device, generator=generator)
        return {"partial": partial, "bias": bias, "out": torch.empty(shape, device=device), "bound": bound}

    moved = 4 * batch * frames * height * width * (9 * channels + channels)
    return Case(name, inputs, 0, 0 if small else moved, small, 1e-5)


def cases() -> list[Case]:
    """The head of LiveAvatar's decoder, 12 frames at 704x384; small frames, with and without the clamp."""
    return [
        _case("head", (1, 3, 12, 704, 384), 1.0, False),
        _case("small", (2, 3, 2, 5, 7), 1.0, True),
        _case("small_free", (1, 2, 3, 1, 130), None, True),
    ]


OP = Op("gather_taps", gather_taps, reference, cases, mutates=("out",), differentiable=False)
