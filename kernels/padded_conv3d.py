"""3-D convolution of zero-ringed channels-last buffers, with residual, RMS norm and SiLU in its epilogue.

    s[t] = bias + sum_{j, dh, dw} weight[:, j, dh, dw] . x[t * time_stride + j, h + dh, w + dw] + residual[t, h, w]
    raw <- s;   normed <- silu(s / max(|s|, 1e-12) * sqrt(C) * gamma)

Shapes: x [B, F, H + 2, W + 2, Cin] whose outermost rows and columns are zeros (the ring) and whose frames follow each
other in memory: F = history + new frames, nothing is padded in time. weight [P, Cout, kt, kh, kw, Cin] (`pack_weight`),
bias [Cout]. The result has T = (F - kt) // time_stride + 1 frames; residual, raw and normed are views
[B, T, H, W, Cout] with channels next to each other and any other strides. kh and kw are 1 or 3.
`frame_split` n: the channels of one result frame are n frames of Cout / n channels (raw [B, n T, H, W, Cout / n]; no
residual, no norm): the temporal upsampling.
P = 4 (`pack_upsampled`): x is doubled in rows and columns (nearest) before a 3x3 convolution, computed as four 2x2
convolutions of x, one for each parity of row and column: 4 / 9 of the products. raw, normed [B, T, 2H, 2W, Cout].
Dtypes: x, weight half precision or float32 alike; products are summed, and the epilogue computed, in float32. Where one
program holds all channels of a pixel, raw and normed are rounded once, where they are stored, in their own dtypes. Else
the sum is stored before it is normed and rounds twice: first to the dtype of raw (without raw: of normed), or, where
the library convolves, before the residual, to that of x.
NaN and Inf go where the sums carry them: into the pixels whose kernel window holds them.
Errors: ValueError for shapes, dtypes and strides that do not fit.  Source: wan.md, 2.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conv3d_triton
from .cases import Case, Inputs, Op, randn
from .channel_norm import check_outputs, check_views, norm_of
from .channel_norm import launch as launch_norm
from .dispatch import fused, triton_runs


def ringed(batch: int, frames: int, height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """A zeroed buffer [B, F, H + 2, W + 2, C] in dtype and on the device of `like`."""
    return like.new_zeros(batch, frames, height + 2, width + 2, channels)


def inner(buffer: Tensor) -> Tensor:
    """[B, F, H + 2, W + 2, C] -> its frames without the ring, a view [B, F, H, W, C]."""
    return buffer[:, :, 1:-1, 1:-1]


def pack_weight(weight: Tensor, channels_in: int | None = None) -> Tensor:
    """[Cout, Cin, kt, kh, kw] -> [1, Cout, kt, kh, kw, channels_in], zeros for the channels that x has more."""
    packed = weight.permute(0, 2, 3, 4, 1)
    return F.pad(packed, (0, (channels_in or weight.shape[1]) - weight.shape[1]))[None].contiguous()


def pack_upsampled(weight: Tensor) -> Tensor:
    """3x3 weight of a doubled picture [Cout, Cin, 3, 3] -> [4, Cout, 1, 2, 2, Cin]; phase = 2 * odd row + odd column.

    An even row of the doubled picture sees rows (h - 1, h, h) of the small one, an odd row (h, h, h + 1).
    """
    w = weight.double().permute(0, 2, 3, 1)  # [Cout, 3, 3, Cin]
    phases = []
    for odd_row in (0, 1):
        r = torch.stack((w[:, : 1 + odd_row].sum(1), w[:, 1 + odd_row :].sum(1)), 1)  # [Cout, 2, 3, Cin]
        for odd_column in (0, 1):
            c = (r[:, :, : 1 + odd_column].sum(2), r[:, :, 1 + odd_column :].sum(2))
            phases.append(torch.stack(c, 2))  # [Cout, 2, 2, Cin]
    return torch.stack(phases)[:, :, None].to(weight.dtype).contiguous()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, time_stride: int, frame_split: int) -> Tensor:
    """The convolution by the library -> [B, T, H, W, Cout]."""
    height, width = x.shape[2] - 2, x.shape[3] - 2
    frames = x.permute(0, 4, 1, 2, 3)  # [B, Cin, F, H + 2, W + 2]
    if weight.shape[3:5] == (1, 1):
        frames = frames[:, :, :, 1:-1, 1:-1]
    kernels = weight.permute(0, 1, 5, 2, 3, 4)  # [P, Cout, Cin, kt, kh, kw]
    bias = bias.to(weight.dtype)
    if len(kernels) == 1:
        y = F.conv3d(frames, kernels[0], bias, (time_stride, 1, 1)).permute(0, 2, 3, 4, 1)
        if frame_split > 1:  # [B, T, H, W, (n C)] -> [B, (T n), H, W, C]
            y = y.unflatten(-1, (frame_split, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        return y
    y = x.new_empty(x.shape[0], x.shape[1], 2 * height, 2 * width, weight.shape[1])
    for phase, kernel in enumerate(kernels):
        up, left = phase // 2, phase % 2
        part = F.conv3d(frames, kernel, bias)[..., up : up + height, left : left + width]
        y[:, :, up::2, left::2] = part.permute(0, 2, 3, 4, 1)
    return y


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    raw: Tensor | None = None,
    normed: Tensor | None = None,
    time_stride: int = 1,
    frame_split: int = 1,
    silu: bool = True,
) -> None:
    s = _convolve(x, weight, bias, time_stride, frame_split).float()
    if residual is not None:
        s = s + residual.float()
    if raw is not None:
        raw.copy_(s)
    if normed is not None:
        assert gamma is not None
        normed.copy_(norm_of(s, gamma, silu))


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    residual: Tensor | None,
    raw: Tensor | None,
    normed: Tensor | None,
    time_stride: int,
    frame_split: int,
    silu: bool,
) -> None:
    """The kernel, with a norm kernel behind it where one program does not hold all channels; or library and norm."""
    channels_in, (phases, channels_out, kt, kh, kw, _) = x.shape[-1], weight.shape
    tile = None
    if conv3d_triton.supported(x, weight):
        tile = conv3d_triton.tile_for(channels_in, channels_out, (kt, kh, kw), phases == 4)
    if tile is None:
        y = _convolve(x, weight, bias, time_stride, frame_split)
        y = y if y.stride(-1) == 1 else y.contiguous()  # the library chooses its layout
        launch_norm(y, gamma, residual, raw, normed, silu)
        return
    together = normed is None or tile.covers(channels_out)
    if raw is None and not together:
        assert normed is not None
        raw = torch.empty_like(normed, memory_format=torch.contiguous_format)
    now = (normed, gamma) if together else (None, None)
    conv3d_triton.launch(tile, x, weight, bias, time_stride, frame_split, residual, raw, *now, silu)
    if not together:
        assert raw is not None
        launch_norm(raw, gamma, None, None, normed, silu)


@torch.library.custom_op("kinora::padded_conv3d", mutates_args=("raw", "normed"))
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    residual: Tensor | None,
    raw: Tensor | None,
    normed: Tensor | None,
    time_stride: int,
    frame_split: int,
    silu: bool,
) -> None:
    run = _run if triton_runs(x) else reference
    run(x, weight, bias, gamma, residual, raw, normed, time_stride, frame_split, silu)


_op.register_fake(lambda *_: None)


def _check(x: Tensor, weight: Tensor, bias: Tensor, time_stride: int, frame_split: int) -> tuple[int, ...]:
    """ValueError unless the operands fit; shape of raw."""
    if x.dim() != 5 or min(x.shape[2:4]) < 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; [batch, frames, rows + 2, columns + 2, channels] is needed")
    batch, length, rows, columns, channels_in = x.shape
    if x.stride()[1:] != (rows * columns * channels_in, columns * channels_in, channels_in, 1):
        raise ValueError(f"the frames of x must follow each other in memory, its strides are {x.stride()}")
    if weight.dim() != 6 or weight.shape[0] not in (1, 4) or weight.shape[5] != channels_in:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; [1 or 4, out, kt, kh, kw, {channels_in}] from pack_weight "
            "or pack_upsampled is needed"
        )
    phases, channels_out, kt, kh, kw, _ = weight.shape
    if (kh, kw) not in (((2, 2),) if phases == 4 else ((1, 1), (3, 3))):
        raise ValueError(f"kernels of {kh}x{kw} in space are not known here; 1x1 and 3x3 are, 2x2 for upsampling")
    if not weight.is_contiguous() or weight.dtype != x.dtype or bias.shape != (channels_out,):
        raise ValueError(
            f"weight must be contiguous and {x.dtype} like x, it is {weight.dtype}; "
            f"bias has shape {tuple(bias.shape)}, ({channels_out},) is needed"
        )
    if length < kt or channels_out % frame_split or (phases == 4 and (time_stride, kt) != (1, 1)):
        raise ValueError(
            f"{length} frames, kernel of {kt} frames, time_stride {time_stride}, {channels_out} channels split "
            f"{frame_split} times, {phases} phases do not go together"
        )
    frames, grow = (length - kt) // time_stride + 1, 2 if phases == 4 else 1
    return (batch, frames * frame_split, grow * (rows - 2), grow * (columns - 2), channels_out // frame_split)


def padded_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    raw: Tensor | None = None,
    normed: Tensor | None = None,
    time_stride: int = 1,
    frame_split: int = 1,
    silu: bool = True,
) -> None:
    """Convolve x into `raw` and, normed, into `normed`; see the module docstring. Not differentiable."""
    shape = _check(x, weight, bias, time_stride, frame_split)
    check_views(shape, residual=residual, raw=raw, normed=normed)
    check_outputs(shape[-1], gamma, raw, normed)
    if frame_split > 1 and not (residual is None and normed is None):
        raise ValueError("frame_split goes with raw only: neither residual nor normed")
    compute = _op if fused(x) else reference
    compute(x, weight, bias, gamma, residual, raw, normed, time_stride, frame_split, silu)


def _case(
    name: str,
    channels: tuple[int, int],
    frames: int,
    size: tuple[int, int],
    kernel: tuple[int, int, int] = (3, 3, 3),
    epilogue: bool = True,
    upsample: bool = False,
    split: int = 1,
    stride: int = 1,
    batch: int = 1,
    small: bool = False,
) -> Case:
    channels_in, channels_out = channels
    taps = torch.Size(kernel).numel()
    grow = 2 if upsample else 1

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        dtype = torch.float32 if small else torch.bfloat16

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return randn(*shape, device=device, generator=generator, dtype=dtype, scale=scale)

        x = ringed(batch, (frames - 1) * stride + kernel[0], *size, channels_in, like=draw(1))
        inner(x).copy_(draw(*inner(x).shape))
        weight = draw(channels_out, channels_in, *kernel, scale=(channels_in * taps) ** -0.5)
        shape = (batch, frames * split, grow * size[0], grow * size[1], channels_out // split)
        return {
            "x": x,
            "weight": pack_upsampled(weight[:, :, 0]) if upsample else pack_weight(weight),
            "bias": draw(channels_out),
            "gamma": draw(channels_out) if epilogue else None,
            "residual": draw(*shape) if epilogue else None,
            "raw": draw(*shape),
            "normed": draw(*shape) if epilogue else None,
            "time_stride": stride,
            "frame_split": split,
        }

    pixels = batch * frames * size[0] * size[1]
    products = pixels * channels_in * channels_out * (16 if upsample else taps)
    through = pixels * (channels_in + grow**2 * channels_out * (3 if epilogue else 1))
    counts = (0, 0) if small else (2 * products, 2 * (through + channels_in * channels_out * taps))
    return Case(name, inputs, *counts, small=small, tolerance=1e-5 if small else 1e-2)


def cases() -> list[Case]:
    """LiveAvatar's decoder, one block of 3 latent frames at 704x384, level by level; small ones with tails."""
    return [
        _case("level3", (96, 96), 12, (704, 384)),
        _case("level2", (192, 192), 12, (352, 192)),
        _case("level1", (384, 384), 6, (176, 96)),
        _case("level0", (384, 384), 3, (88, 48)),
        _case("widen", (192, 384), 6, (176, 96)),
        _case("up3", (192, 96), 12, (352, 192), (1, 3, 3), upsample=True),
        _case("up2", (384, 192), 12, (176, 96), (1, 3, 3), upsample=True),
        _case("double", (384, 768), 6, (176, 96), (3, 1, 1), epilogue=False, split=2),
        _case("halve", (384, 384), 3, (88, 48), (3, 1, 1), epilogue=False, stride=2),
        _case("head", (96, 27), 12, (704, 384), (3, 1, 1), epilogue=False),
        _case("small", (16, 24), 2, (5, 7), batch=2, small=True),
        _case("small_wide", (32, 96), 1, (3, 4), small=True),
        _case("small_up", (16, 16), 2, (3, 4), (1, 3, 3), upsample=True, batch=2, small=True),
        _case("small_double", (16, 32), 2, (4, 3), (3, 1, 1), epilogue=False, split=2, batch=2, small=True),
        _case("small_halve", (16, 16), 2, (4, 3), (3, 1, 1), epilogue=False, stride=2, small=True),
        _case("one_pixel", (16, 3), 1, (1, 1), (1, 1, 1), small=True),
    ]


OP = Op("padded_conv3d", padded_conv3d, reference, cases, mutates=("raw", "normed"), differentiable=False)
