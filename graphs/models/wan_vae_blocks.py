"""The layers of the Wan 2.1 video VAE and its two networks (wan.md, 2.1).

Every layer that looks back in time keeps its last input frames in one *slot*. The slots of a stream are plain
tensors in order of execution, of fixed shape from the first chunk on: a history that is not yet there is zeros, so
that the first chunk differs from the later ones only in the two temporal resamplers, which let the very first frame
of a stream pass. Any number of frames may go through in one chunk; the result is that of one frame at a time.
Shapes: B batch, C channels, T frames, H, W rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.dispatch import fused


class SlotCursor:
    """Walks the slots of a stream through one chunk: each layer takes its history and puts the next one.

    Nothing is written in place: `slots` are the new ones, and a chunk that fails leaves the stream as it was.
    """

    def __init__(self, slots: Sequence[Tensor]):
        self.first = not slots  # the chunk that opens the stream
        self.slots: list[Tensor] = []
        self._old = slots

    def take(self) -> Tensor | None:
        """History of the layer that runs now, None in the first chunk."""
        return None if self.first else self._old[len(self.slots)]

    def put(self, history: Tensor) -> None:
        self.slots.append(history)


class ChannelRmsNorm(nn.Module):
    """y = x / max(|x|, 1e-12) * sqrt(C) * gamma, the L2 norm over channels; [B, C, ...] of any rank.

    `wide`: the result stays float32 up to the next convolution (autocast upstream); otherwise each of the four
    operations rounds in the dtype of x. `ndim` is the rank of the input that the published weight is shaped for.
    """

    wide = False

    def __init__(self, dim: int, ndim: int = 5):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * (ndim - 2)))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.reshape(-1, *(1,) * (x.dim() - 2))
        root = x.shape[1] ** 0.5
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        if not self.wide:
            norm = norm.to(x.dtype)
        y = x / norm.clamp_min(1e-12)
        if torch.is_grad_enabled():
            return y * root * gamma
        return y.mul_(root).mul_(gamma)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the norm, what stands before every causal convolution: one kernel where the fused op runs."""
        if fused(x, self.gamma):
            return ops.channel_norm_silu(x, self.gamma.flatten())
        return F.silu(self(x), inplace=not torch.is_grad_enabled())


class CausalConv3d(nn.Conv3d):
    """`ops.causal_conv3d` with its own weights; with a cursor the history comes from, and goes to, its slot."""

    bias: Tensor  # these three are narrower than the annotations of nn.Conv3d
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]

    def __init__(self, channels_in: int, channels_out: int, kernel: int | tuple[int, int, int], stride=1, padding=0):
        super().__init__(channels_in, channels_out, kernel, stride, padding)

    def forward(self, x: Tensor, cursor: SlotCursor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        history = None
        if cursor is not None:
            history = cursor.take()
            cursor.put(ops.next_history(x, history))
        return ops.causal_conv3d(x, self.weight, self.bias, history, self.stride, self.padding)


class FrameConv(nn.Conv2d):
    """2-D convolution of every frame: [B, C, T, H, W] -> [B, C', T, H', W']."""

    bias: Tensor  # these three are narrower than the annotations of nn.Conv2d
    stride: tuple[int, int]
    padding: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2)  # [B, T, C, H, W]
        y = ops.conv2d(frames.flatten(0, 1), self.weight, self.bias, self.stride, self.padding)
        return y.unflatten(0, frames.shape[:2]).transpose(1, 2)


class ResidualBlock(nn.Module):
    """Two times norm, SiLU, causal 3x3x3 convolution, plus the input (through 1x1x1 where the width changes)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelRmsNorm(dim_in),
                "2": CausalConv3d(dim_in, dim_out, 3, padding=1),
                "3": ChannelRmsNorm(dim_out),
                "6": CausalConv3d(dim_out, dim_out, 3, padding=1),
            }
        )
        self.shortcut = CausalConv3d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x: Tensor, cursor: SlotCursor) -> Tensor:
        layers: Any = self.residual.values()
        norm_a, conv_a, norm_b, conv_b = layers
        y = conv_a(norm_a.silu(x), cursor)
        y = conv_b(norm_b.silu(y), cursor)
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """One head of attention over the positions of each frame, plus the input; nothing crosses frames or chunks."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelRmsNorm(dim, ndim=4)
        self.to_qkv = FrameConv(dim, 3 * dim, 1)
        self.proj = FrameConv(dim, dim, 1)

    def forward(self, x: Tensor, cursor: SlotCursor | None = None) -> Tensor:
        batch, frames, (height, width) = x.shape[0], x.shape[2], x.shape[3:]
        qkv = self.to_qkv(self.norm(x)).transpose(1, 2).flatten(0, 1)  # [B * T, 3C, H, W]
        q, k, v = qkv.flatten(2).transpose(1, 2)[:, :, None].chunk(3, -1)  # [B * T, H * W, 1, C]
        y = ops.rope_attention(q, [k], [v])
        y = y[:, :, 0].unflatten(0, (batch, frames)).unflatten(2, (height, width))  # [B, T, H, W, C]
        return x + self.proj(y.permute(0, 4, 1, 2, 3))


class Downsample(nn.Module):
    """Halves rows and columns, then, if `temporal`, frames; the first frame of a stream passes (T -> 1 + (T-1)/2)."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(dim, dim, 3, stride=2)})
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def spatial(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, H/2, W/2]; one zero column on the right and one zero row at the bottom."""
        return self.resample["1"](F.pad(x, (0, 1, 0, 1)))

    def forward(self, x: Tensor, cursor: SlotCursor) -> Tensor:
        x = self.spatial(x)
        if self.time_conv is None:
            return x
        last = cursor.take()
        cursor.put(ops.next_history(x, None, frames=1))
        if last is not None:
            return self.time_conv(torch.cat((last, x), 2))
        if x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], self.time_conv(x)), 2)


class Upsample(nn.Module):
    """Doubles frames, if `temporal`, then rows and columns, and halves the channels.

    The first frame of a stream is not doubled and is no history for the next ones (T -> 1 + 2(T-1) frames).
    """

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(dim, dim // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0)) if temporal else None

    def spatial(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C/2, T, 2H, 2W]."""
        frames = x.transpose(1, 2)
        large = F.interpolate(frames.flatten(0, 1), scale_factor=2.0, mode="nearest-exact")
        return self.resample["1"](large.unflatten(0, frames.shape[:2]).transpose(1, 2))

    def _double(self, x: Tensor, cursor: SlotCursor) -> list[Tensor]:
        """[B, C, T, H, W] -> 2T frames [B, C, 1, H, W]: both halves of the channels of a frame follow each other."""
        pairs = self.time_conv(x, cursor)  # type: ignore[misc]  # [B, 2C, T, H, W]
        return [half for frame in pairs.split(1, 2) for half in frame.chunk(2, 1)]

    def forward(self, x: Tensor, cursor: SlotCursor) -> Tensor:
        if self.time_conv is not None:
            if not cursor.first:
                x = torch.cat(self._double(x, cursor), 2)
            elif x.shape[2] == 1:
                cursor.put(ops.next_history(torch.zeros_like(x), None))
            else:
                x = torch.cat((x[:, :, :1], *self._double(x[:, :, 1:], cursor)), 2)
        return self.spatial(x)


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList((ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)))


def _head(dim: int, channels_out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelRmsNorm(dim), "2": CausalConv3d(dim, channels_out, 3, padding=1)})


class Encoder(nn.Module):
    """Pixels [B, 3, T, H, W] -> moments [B, 2 z, T', H', W'] before the 1x1x1 convolution `conv1` of the VAE."""

    def __init__(self, dim: int, z_dim: int, dim_mult: Sequence[int], blocks: int, temporal: Sequence[bool]):
        super().__init__()
        self.conv1 = CausalConv3d(3, dim, 3, padding=1)
        self.downsamples = nn.ModuleList()
        width = dim
        for level, mult in enumerate(dim_mult):
            for _ in range(blocks):
                self.downsamples.append(ResidualBlock(width, dim * mult))
                width = dim * mult
            if level < len(temporal):
                self.downsamples.append(Downsample(width, temporal[level]))
        self.middle = _middle(width)
        self.head = _head(width, 2 * z_dim)

    def forward(self, x: Tensor, cursor: SlotCursor) -> Tensor:
        x = self.conv1(x, cursor)
        for block in (*self.downsamples, *self.middle):
            x = block(x, cursor)
        norm: Any = self.head["0"]
        return self.head["2"](norm.silu(x), cursor)


class Decoder(nn.Module):
    """Latents [B, z, F, h, w], after the 1x1x1 convolution `conv2` of the VAE, -> pixels [B, 3, T, H, W]."""

    def __init__(self, dim: int, z_dim: int, dim_mult: Sequence[int], blocks: int, temporal: Sequence[bool]):
        super().__init__()
        width = dim * dim_mult[-1]
        self.conv1 = CausalConv3d(z_dim, width, 3, padding=1)
        self.middle = _middle(width)
        self.upsamples = nn.ModuleList()
        for level, mult in enumerate(reversed(dim_mult)):
            for _ in range(blocks + 1):
                self.upsamples.append(ResidualBlock(width, dim * mult))
                width = dim * mult
            if level < len(temporal):
                self.upsamples.append(Upsample(width, temporal[-1 - level]))
                width //= 2
        self.head = _head(width, 3)

    def forward(self, x: Tensor, cursor: SlotCursor) -> Tensor:
        x = self.conv1(x, cursor)
        for block in (*self.middle, *self.upsamples):
            x = block(x, cursor)
        norm: Any = self.head["0"]
        return self.head["2"](norm.silu(x), cursor)
