"""The Triton kernel of `padded_conv3d`: an implicit matrix product over a zero-ringed channels-last buffer.

One program computes BLOCK_M pixels of one output frame, for all output channels or a block of them. Pixels are counted
along the ringed rows, so that a kernel tap is a *constant shift* of the row index: the A operand of every tap is one
plain 2-D TMA block of the buffer seen as [pixels, channels], without masks or address arithmetic. The two ring columns
of each row are computed and thrown away (2 / W of the work).
Output channels that are no power of two (96, 192, 384) are covered exactly by two accumulators (64 + 32, 128 + 64,
256 + 128) that share the A block.
Programs that run together share one place and differ in output channels, then phase, then frame: each input frame is
read from memory about once, although three output frames need it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .dispatch import interpreting


@dataclass(frozen=True)
class Tile:
    """Block sizes: pixels `m`, output channels `n` (+ `n2` in a second accumulator), input channels `k`."""

    m: int
    n: int
    n2: int
    k: int
    warps: int
    stages: int

    def covers(self, channels: int) -> bool:
        """Whether one program holds all output channels of a pixel, as the fused norm needs."""
        return self.n + self.n2 >= channels


@triton.jit
def _add_residual(acc, bias, residual, pixels, inside, channels, COUT: tl.constexpr):
    """acc + bias + residual, zero outside of the picture and beyond the last channel."""
    kept = inside[:, None] & (channels < COUT)[None, :]
    y = acc + tl.load(bias + channels, mask=channels < COUT, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += tl.load(residual + pixels[:, None] + channels[None, :], mask=kept, other=0.0).to(tl.float32)
    return tl.where(kept, y, 0.0)


@triton.jit
def _store(out, y, pixels, inside, columns, channels, COUT: tl.constexpr):
    kept = inside[:, None] & (channels < COUT)[None, :]
    tl.store(out + pixels[:, None] + columns[None, :], y.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _store_normed(out, y, scale, gamma, pixels, inside, channels, COUT: tl.constexpr, SILU: tl.constexpr):
    y = y * scale[:, None] * tl.load(gamma + channels, mask=channels < COUT, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    _store(out, y, pixels, inside, channels, channels, COUT)


# sizes are no compile-time facts: the first chunk of a stream, and other pictures, take the same code
@triton.jit(do_not_specialize=["frames", "height", "width", "plane", "batch_rows", "batch"])
def _conv_kernel(
    x_desc,  # [batch * frames * plane, CIN]
    w_desc,  # [phases * COUT, taps * CIN], in blocks of BLOCK_N rows
    w2_desc,  # the same, in blocks of BLOCK_N2 rows
    bias,
    gamma,
    residual,
    raw,
    normed,
    residual_strides,  # of batch, frame, row, column, in elements
    raw_strides,
    normed_strides,
    frames,  # of the result, before the split
    height,
    width,
    plane,  # (height + 2) * (width + 2)
    batch_rows,  # pixels from one batch entry of x to the next
    batch,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TIME_STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    SPLIT: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCKS_N: tl.constexpr = 1 if BLOCK_N2 > 0 else (COUT + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = CIN // BLOCK_K
    pid = tl.program_id(0)
    n0 = (pid % BLOCKS_N) * BLOCK_N
    pid = pid // BLOCKS_N
    up = 0  # row and column of the phase
    left = 0
    weight_row = n0
    if UPSAMPLE:
        up = pid % 4 // 2
        left = pid % 2
        weight_row += (pid % 4) * COUT
        pid = pid // 4
    frame = pid % frames
    pid = pid // frames
    entry = pid % batch
    p0 = (pid // batch) * BLOCK_M

    pitch = width + 2
    # the first pixel of a tile lies in the row under the upper ring; even kernels (phases) reach one less
    row0 = entry * batch_rows + frame * TIME_STRIDE * plane + pitch + p0
    row0 += (up - 1) * pitch + left - 1 if UPSAMPLE else -(KH // 2) * pitch - KW // 2
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    for step in range(KT * KH * KW * CHUNKS):
        tap = step // CHUNKS
        row = row0 + (tap // (KH * KW)) * plane + (tap // KW % KH) * pitch + tap % KW
        a = x_desc.load([row, (step % CHUNKS) * BLOCK_K])  # [M, K]
        w = w_desc.load([weight_row, step * BLOCK_K])  # [N, K]
        acc = tl.dot(a, w.T, acc, input_precision="ieee")
        if BLOCK_N2 > 0:
            w2 = w2_desc.load([weight_row + BLOCK_N, step * BLOCK_K])
            acc2 = tl.dot(a, w2.T, acc2, input_precision="ieee")

    pixel = p0 + tl.arange(0, BLOCK_M)
    h = pixel // pitch
    w_ = pixel % pitch - 1
    inside = (h < height) & (w_ >= 0) & (w_ < width)
    if UPSAMPLE:
        h = 2 * h + up
        w_ = 2 * w_ + left
    channels = n0 + tl.arange(0, BLOCK_N)
    at = tl.zeros([BLOCK_M], tl.int32)
    entry64 = entry.to(tl.int64)
    frame64 = frame.to(tl.int64)
    if residual is not None:
        residual += entry64 * residual_strides[0] + frame64 * residual_strides[1]
        at = h * residual_strides[2] + w_ * residual_strides[3]
    y = _add_residual(acc, bias, residual, at, inside, channels, COUT)
    squares = tl.sum(y * y, 1)
    if BLOCK_N2 > 0:
        channels2 = BLOCK_N + tl.arange(0, BLOCK_N2)
        y2 = _add_residual(acc2, bias, residual, at, inside, channels2, COUT)
        squares += tl.sum(y2 * y2, 1)

    if raw is not None:
        raw += entry64 * raw_strides[0] + frame64 * SPLIT * raw_strides[1]
        at = h * raw_strides[2] + w_ * raw_strides[3]
        EACH: tl.constexpr = COUT // SPLIT  # channels of one result frame
        columns = channels % EACH + channels // EACH * raw_strides[1]
        _store(raw, y, at, inside, columns, channels, COUT)
        if BLOCK_N2 > 0:
            columns = channels2 % EACH + channels2 // EACH * raw_strides[1]
            _store(raw, y2, at, inside, columns, channels2, COUT)
    if normed is not None:
        norm = tl.sqrt(squares)
        scale = tl.sqrt(COUT * 1.0) / tl.where(norm < 1e-12, 1e-12, norm)  # keeps NaN
        normed += entry64 * normed_strides[0] + frame64 * normed_strides[1]
        at = h * normed_strides[2] + w_ * normed_strides[3]
        _store_normed(normed, y, scale, gamma, at, inside, channels, COUT, SILU)
        if BLOCK_N2 > 0:
            _store_normed(normed, y2, scale, gamma, at, inside, channels2, COUT, SILU)


def launch(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    time_stride: int,
    split: int,
    residual: Tensor | None,
    raw: Tensor | None,
    normed: Tensor | None,
    gamma: Tensor | None,
    silu: bool,
) -> None:
    """Run the kernel on the arguments of `padded_conv3d`, which has checked them.

    `tile.k` divides the input channels; `tile` covers the output channels where `normed` is given.
    """
    if interpreting():  # the interpreter multiplies the bits of bf16 as integers
        x, weight = x.float(), weight.float()
    batch, length, ringed_height, ringed_width, channels_in = x.shape
    phases, channels_out, kt, kh, kw, _ = weight.shape
    height, width = ringed_height - 2, ringed_width - 2
    plane = ringed_height * ringed_width
    batch_rows = x.stride(0) // channels_in
    frames = (length - kt) // time_stride + 1
    rows = (batch - 1) * batch_rows + length * plane
    x_desc = TensorDescriptor(x, [rows, channels_in], [channels_in, 1], [tile.m, tile.k])
    taps = kt * kh * kw * channels_in
    shape, strides = [phases * channels_out, taps], [taps, 1]
    w_desc = TensorDescriptor(weight, shape, strides, [tile.n, tile.k])
    w2_desc = TensorDescriptor(weight, shape, strides, [tile.n2, tile.k]) if tile.n2 else None
    blocks_n = 1 if tile.n2 else triton.cdiv(channels_out, tile.n)
    grid = (blocks_n * phases * frames * batch * triton.cdiv(height * ringed_width, tile.m),)
    _conv_kernel[grid](
        x_desc,
        w_desc,
        w2_desc,
        bias.contiguous(),
        None if gamma is None else gamma.contiguous(),
        residual,
        raw,
        normed,
        _strides(residual),
        _strides(raw),
        _strides(normed),
        frames,
        height,
        width,
        plane,
        batch_rows,
        batch,
        CIN=channels_in,
        COUT=channels_out,
        KT=kt,
        KH=kh,
        KW=kw,
        TIME_STRIDE=time_stride,
        UPSAMPLE=phases == 4,
        SPLIT=split,
        SILU=silu,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_N2=tile.n2,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _strides(view: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if view is None else view.stride()[:4]  # type: ignore[return-value]


MEASURED: dict[tuple[int, int, tuple[int, int, int], bool], Tile | None] = {
    (16, 384, (3, 3, 3), False): Tile(128, 256, 128, 16, 8, 4),
    (384, 384, (3, 3, 3), False): None,
    (384, 768, (3, 1, 1), False): Tile(128, 256, 0, 64, 8, 4),
    (384, 192, (1, 2, 2), True): Tile(128, 128, 64, 64, 8, 4),
    (192, 384, (3, 3, 3), False): None,
    (192, 192, (3, 3, 3), False): Tile(128, 128, 64, 64, 8, 4),
    (192, 96, (1, 2, 2), True): Tile(128, 128, 0, 64, 8, 3),
    (96, 96, (3, 3, 3), False): Tile(256, 64, 32, 32, 4, 4),
    (96, 27, (3, 1, 1), False): Tile(128, 32, 0, 32, 4, 6),
    (16, 96, (3, 3, 3), False): Tile(128, 64, 32, 16, 4, 6),
    (96, 192, (3, 3, 3), False): Tile(128, 128, 64, 32, 4, 4),
    (192, 192, (3, 1, 1), False): Tile(128, 128, 64, 64, 8, 4),
    (384, 384, (3, 1, 1), False): Tile(128, 128, 0, 64, 4, 6),
    (384, 16, (3, 3, 3), False): Tile(128, 16, 0, 128, 4, 6),
}
"""Best tile by (input channels, output channels, kernel, upsample) on an H200 (`python -m kinora.bench.vae_fused`);
None: the library is faster."""


def tile_for(channels_in: int, channels_out: int, kernel: tuple[int, int, int], upsample: bool) -> Tile | None:
    """The measured tile of a layer, or one by rule; None: take the library's convolution."""
    key = (channels_in, channels_out, kernel, upsample)
    if key in MEASURED:
        return MEASURED[key]
    k = next(size for size in (64, 32, 16) if channels_in % size == 0)
    n = min(max(1 << (channels_out - 1).bit_length(), 16), 128)
    halves = {96: (64, 32), 192: (128, 64)}
    n, n2 = halves.get(channels_out, (n, 0))
    return Tile(128, n, n2, k, 8 if n > 64 else 4, 4)


def takes(weight: Tensor) -> bool:
    """Whether the kernel is for this dtype here: on a GPU float32 products stay with the library, which is exact."""
    return weight.dtype in (torch.float16, torch.bfloat16) or not weight.is_cuda


def supported(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can run: its TMA blocks want 16-byte aligned pixels and at least 16 channels."""
    return takes(weight) and x.shape[-1] % 16 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
