"""The layers of the Wan VAE over static channels-last memory: what `wan_vae.py` chains to a decoder and an encoder.

Every stage owns its input memory. The stage before writes into it, norm included: a convolution asks the next stage
for its `Inlet` and fills that in its epilogue, so that nothing pointwise is left and nothing is laid out twice. Layers
that look back keep their past frames in front of the new ones in the same buffer, a `Window`.
Shapes: B batch, T frames, H, W rows and columns, C channels; all frames [B, T, H, W, C].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.channel_norm import channel_norm
from ...kernels.gather_taps import gather_taps, tap_weight
from ...kernels.padded_conv3d import inner, pack_upsampled, pack_weight, padded_conv3d, ringed
from ..models.wan_vae_blocks import AttentionBlock, CausalConv3d, ChannelRmsNorm, Downsample, ResidualBlock, Upsample


@dataclass(frozen=True)
class Inlet:
    """Where the frames for a stage go: as they are into `raw`, normed (with `gamma`, perhaps SiLU) into `normed`."""

    raw: Tensor | None = None
    normed: Tensor | None = None
    gamma: Tensor | None = None
    silu: bool = True

    def part(self, start: int, stop: int) -> "Inlet":
        """The frames start ... stop - 1."""
        raw, normed = (None if view is None else view[:, start:stop] for view in (self.raw, self.normed))
        return Inlet(raw, normed, self.gamma, self.silu)

    def fill(self, x: Tensor, residual: Tensor | None = None) -> None:
        """Write x + residual."""
        channel_norm(x, self.gamma, residual, self.raw, self.normed, self.silu)


class Stage(Protocol):
    """A layer that takes `frames` frames in one go; `first`: they open the stream."""

    def frames_out(self, frames: int, first: bool) -> int: ...

    def inlet(self, frames: int, first: bool) -> Inlet: ...

    def run(self, frames: int, first: bool, outlet: Inlet) -> None: ...

    def windows(self) -> list["Window"]: ...


@dataclass(frozen=True)
class Room:
    """What memory a stage needs: the most frames in one go, and their size."""

    batch: int
    frames: int
    height: int
    width: int
    like: Tensor  # of the dtype and on the device of the network

    def stream(self, channels: int, scratch: "Scratch") -> Tensor:
        """What goes on between the blocks of a level, [B, T, H, W, C]."""
        size = self.batch, self.frames, self.height, self.width, channels
        return scratch.take("stream", channels, size, lambda: self.like.new_empty(size))

    def window(self, channels: int, past: int = 0) -> "Window":
        return Window(ringed(*self._size(channels, past), self.like), past, channels)

    def shared_window(self, channels: int, past: int, scratch: "Scratch", use: str) -> "SharedWindow":
        """A window in the buffer that all of this size and `use` share; see `SharedWindow`."""
        size = self._size(channels, past)
        buffer = scratch.take(use, channels, size, lambda: ringed(*size, self.like))
        return SharedWindow(buffer, past, channels)

    def _size(self, channels: int, past: int) -> tuple[int, int, int, int, int]:
        aligned = -(-channels // 16) * 16  # what the kernel's loads want; the extra channels are zeros
        return self.batch, past + self.frames, self.height, self.width, aligned


class Scratch:
    """Buffers whose contents matter only within one step of a stream: stages share them, and streams that take turns.

    By use, size and channels; who needs fewer frames gets the first ones of what is there. For streams of one network
    in one dtype on one device.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[object, ...], Tensor] = {}

    def take(self, use: str, channels: int, size: tuple[int, int, int, int, int], make: Callable[[], Tensor]) -> Tensor:
        """At least `size` [B, T, H, W, C] (a ring around H and W aside) from `make`, or part of what there is."""
        batch, frames, *rest = size
        key = use, channels, batch, *rest
        held = self.buffers.get(key)
        if held is None or held.shape[1] < frames or (batch > 1 and held.shape[1] != frames):
            held = self.buffers[key] = make()
        return held[:, :frames]


class Window:
    """A zero-ringed buffer with `past` frames of history in front of the new ones."""

    def __init__(self, buffer: Tensor, past: int, channels: int):
        self.buffer = buffer  # [B, past + T, H + 2, W + 2, C]
        self.past = past
        self.channels = channels

    def new(self, frames: int, early: int = 0) -> Tensor:
        """The place of the new frames [B, frames, H, W, C]; `early`: that many of them lie in the history."""
        start = self.past - early
        return inner(self.buffer)[:, start : start + frames, ..., : self.channels]

    def filled(self, frames: int) -> Tensor:
        """History and new frames, with the ring."""
        return self.buffer[:, : self.past + frames]

    def roll(self, frames: int) -> None:
        """The last frames of history and `frames` new ones become the history."""
        if frames >= self.past:
            self.buffer[:, : self.past].copy_(self.buffer[:, frames : frames + self.past])
        else:  # they overlap: one after the other
            for i in range(self.past):
                self.buffer[:, i].copy_(self.buffer[:, frames + i])

    def reset(self) -> None:
        self.buffer[:, : self.past].zero_()


class SharedWindow(Window):
    """A window whose history is kept apart, so that the buffer is free for others once the new frames are convolved.

    At the last level of the decoder the buffers are most of its memory, and only two of them are in use at a time: the
    input of a convolution ("a") and its output ("b"). The price is one more copy of the history. `filled` comes before
    `roll`, and `roll` before the next writer of the buffer.
    """

    def __init__(self, buffer: Tensor, past: int, channels: int):
        super().__init__(buffer, past, channels)
        self.history = torch.zeros_like(inner(buffer)[:, :past, ..., :channels])

    def filled(self, frames: int) -> Tensor:
        self._frames(0).copy_(self.history)
        return super().filled(frames)

    def roll(self, frames: int) -> None:
        self.history.copy_(self._frames(frames))

    def reset(self) -> None:
        self.history.zero_()

    def _frames(self, start: int) -> Tensor:
        """As many frames as the history has, without the ring."""
        return inner(self.buffer)[:, start : start + self.past, ..., : self.channels]


class Conv:
    """A packed convolution with its bias in float32."""

    def __init__(self, weight: Tensor, bias: Tensor, channels_in: int | None = None, upsample: bool = False):
        """`weight` [Cout, Cin, kt, kh, kw]; with `upsample` [Cout, Cin, 3, 3]."""
        packed = pack_upsampled(weight) if upsample else pack_weight(weight, channels_in)
        self.weight = packed.detach()
        self.bias = bias.detach().float()

    def __call__(self, x: Tensor, to: Inlet, residual: Tensor | None = None, stride: int = 1, split: int = 1) -> None:
        """Convolve the ringed x into `to`."""
        padded_conv3d(x, self.weight, self.bias, to.gamma, residual, to.raw, to.normed, stride, split, to.silu)


def _gamma(norm: ChannelRmsNorm) -> Tensor:
    return norm.gamma.detach().float().flatten()


class WindowConv:
    """A causal 3x3x3 convolution, with a norm and SiLU in front of it if `norm` is given."""

    def __init__(self, conv: CausalConv3d, room: Room, norm: ChannelRmsNorm | None = None):
        self.window = room.window(conv.in_channels, past=2)
        self.conv = Conv(conv.weight, conv.bias, self.window.buffer.shape[-1])
        self.gamma = None if norm is None else _gamma(norm)

    def frames_out(self, frames: int, first: bool) -> int:
        return frames

    def inlet(self, frames: int, first: bool) -> Inlet:
        place = self.window.new(frames)
        return Inlet(raw=place) if self.gamma is None else Inlet(normed=place, gamma=self.gamma)

    def run(self, frames: int, first: bool, outlet: Inlet) -> None:
        self.conv(self.window.filled(frames), outlet)
        self.window.roll(frames)

    def windows(self) -> list[Window]:
        return [self.window]


class Residual:
    """`ResidualBlock`: both norms are in the epilogues before them, the sum in that of the second convolution."""

    def __init__(self, block: ResidualBlock, room: Room, stream: Tensor, scratch: Scratch):
        """`stream` [B, T, H, W, C] holds the block's input; blocks of a level share it, each overwrites it."""
        layers: Any = block.residual
        norm_a, conv_a, norm_b, conv_b = layers.values()
        self.stream = stream
        self.gamma_a, self.gamma_b = _gamma(norm_a), _gamma(norm_b)
        self.window_a = room.shared_window(conv_a.in_channels, 2, scratch, "a")
        self.window_b = room.shared_window(conv_b.in_channels, 2, scratch, "b")
        self.conv_a = Conv(conv_a.weight, conv_a.bias, self.window_a.buffer.shape[-1])
        self.conv_b = Conv(conv_b.weight, conv_b.bias, self.window_b.buffer.shape[-1])
        self.shortcut: Tensor | None = None
        if block.shortcut is not None:
            self.shortcut = block.shortcut.weight.detach().flatten(1)  # [C', C]
            self.conv_b.bias = self.conv_b.bias + block.shortcut.bias.detach().float()

    def frames_out(self, frames: int, first: bool) -> int:
        return frames

    def inlet(self, frames: int, first: bool) -> Inlet:
        return Inlet(self.stream[:, :frames], self.window_a.new(frames), self.gamma_a)

    def run(self, frames: int, first: bool, outlet: Inlet) -> None:
        x = self.stream[:, :frames]
        self.conv_a(self.window_a.filled(frames), Inlet(normed=self.window_b.new(frames), gamma=self.gamma_b))
        self.window_a.roll(frames)  # the next convolution may write where this window was
        residual = x if self.shortcut is None else F.linear(x, self.shortcut)
        self.conv_b(self.window_b.filled(frames), outlet, residual)
        self.window_b.roll(frames)

    def windows(self) -> list[Window]:
        return [self.window_a, self.window_b]


class Attention:
    """`AttentionBlock`: one head over the positions of each frame."""

    def __init__(self, block: AttentionBlock, room: Room, stream: Tensor):
        self.stream = stream
        self.normed = torch.empty_like(stream)
        self.gamma = _gamma(block.norm)
        self.qkv = (block.to_qkv.weight.detach().flatten(1), block.to_qkv.bias.detach())
        self.proj = (block.proj.weight.detach().flatten(1), block.proj.bias.detach())

    def frames_out(self, frames: int, first: bool) -> int:
        return frames

    def inlet(self, frames: int, first: bool) -> Inlet:
        return Inlet(self.stream[:, :frames], self.normed[:, :frames], self.gamma, silu=False)

    def run(self, frames: int, first: bool, outlet: Inlet) -> None:
        x = self.normed[:, :frames]
        qkv = F.linear(x, *self.qkv).flatten(0, 1).flatten(1, 2)  # [B * T, H * W, 3C]
        q, k, v = qkv[:, None].chunk(3, -1)  # [B * T, 1, H * W, C]
        y = F.scaled_dot_product_attention(q, k, v)
        outlet.fill(F.linear(y.view(x.shape), *self.proj), residual=self.stream[:, :frames])

    def windows(self) -> list[Window]:
        return []


class Up:
    """`Upsample`: the temporal convolution writes both halves of its channels as frames that follow each other."""

    def __init__(self, block: Upsample, room: Room, scratch: Scratch):
        conv: Any = block.resample["1"]
        self.time: Window | None = None
        large = room
        if block.time_conv is not None:
            self.time = room.window(conv.in_channels, past=2)
            self.time_conv = Conv(block.time_conv.weight, block.time_conv.bias, self.time.buffer.shape[-1])
            large = Room(room.batch, 2 * room.frames, room.height, room.width, room.like)
        self.picture = large.shared_window(conv.in_channels, 0, scratch, "picture")
        self.conv = Conv(_widened(conv.weight, self.picture), conv.bias, upsample=True)

    def frames_out(self, frames: int, first: bool) -> int:
        return frames if self.time is None else 2 * frames - first

    def inlet(self, frames: int, first: bool) -> Inlet:
        if self.time is None:
            return Inlet(raw=self.picture.new(frames))
        return Inlet(raw=self.time.new(frames, early=first))

    def run(self, frames: int, first: bool, outlet: Inlet) -> None:
        count = self.frames_out(frames, first)
        if self.time is not None:
            self._double(self.time, frames, first, self.picture.new(count))
        self.conv(self.picture.filled(count), outlet)

    def _double(self, time: Window, frames: int, first: bool, to: Tensor) -> None:
        if first:  # the frame that opens a stream passes, and is no history for the others
            opening = time.new(1, early=1)
            to[:, :1].copy_(opening)
            opening.zero_()
        if frames > first:
            self.time_conv(time.filled(frames - first), Inlet(raw=to[:, first:]), split=2)
            time.roll(frames - first)

    def windows(self) -> list[Window]:
        return [] if self.time is None else [self.time]


class Down:
    """`Downsample`: the library convolves the ringed picture, then the temporal convolution skips every other frame."""

    def __init__(self, block: Downsample, room: Room, scratch: Scratch):
        conv: Any = block.resample["1"]
        self.picture = room.shared_window(conv.in_channels, 0, scratch, "picture")
        # the ring is zero, the kernel's first row and column too: 3x3 with one zero row and column behind the picture
        weight = F.pad(_widened(conv.weight.detach(), self.picture), (1, 0, 1, 0))
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.detach()
        self.time: Window | None = None
        if block.time_conv is not None:
            half = Room(room.batch, room.frames, room.height // 2, room.width // 2, room.like)
            self.time = half.window(conv.out_channels, past=1)
            self.time_conv = Conv(block.time_conv.weight, block.time_conv.bias, self.time.buffer.shape[-1])

    def frames_out(self, frames: int, first: bool) -> int:
        return frames if self.time is None else (frames + first) // 2

    def inlet(self, frames: int, first: bool) -> Inlet:
        return Inlet(raw=self.picture.new(frames))

    def run(self, frames: int, first: bool, outlet: Inlet) -> None:
        picture = self.picture.filled(frames)
        small = F.conv2d(picture.flatten(0, 1).permute(0, 3, 1, 2), self.weight, self.bias, stride=2)
        small = small.contiguous(memory_format=torch.channels_last)  # where the library chose another layout
        x = small.permute(0, 2, 3, 1).unflatten(0, picture.shape[:2])  # [B, T, H / 2, W / 2, C]
        if self.time is None:
            outlet.fill(x)
            return
        self.time.new(frames, early=first).copy_(x)
        if first:  # the frame that opens a stream passes, and is the history of the others
            outlet.part(0, 1).fill(x[:, :1])
        if frames > first:
            self.time_conv(self.time.filled(frames - first), outlet.part(first, (frames + first) // 2), stride=2)
        self.time.roll(frames - first)

    def windows(self) -> list[Window]:
        return [] if self.time is None else [self.time]


class PixelHead:
    """Norm, SiLU and the last convolution of the decoder, to few channels: see `gather_taps`."""

    def __init__(
        self,
        norm: ChannelRmsNorm,
        conv: CausalConv3d,
        room: Room,
        frames: Tensor,
        bound: float | None,
        scratch: Scratch,
    ):
        """`frames` [B, 3, T, H, W]: where the pixels go; the window is "a", as that of a block would be."""
        self.gamma = _gamma(norm)
        self.window = room.shared_window(conv.in_channels, 2, scratch, "a")
        self.frames, self.bound = frames, bound
        taps = tap_weight(conv.weight)
        self.conv = Conv(taps, taps.new_zeros(len(taps)), self.window.buffer.shape[-1])
        self.bias = conv.bias.detach().float()
        exact = Room(room.batch, room.frames, room.height, room.width, room.like.float())
        self.partial = exact.shared_window(len(taps), 0, scratch, "taps")

    def frames_out(self, frames: int, first: bool) -> int:
        return frames

    def inlet(self, frames: int, first: bool) -> Inlet:
        return Inlet(normed=self.window.new(frames), gamma=self.gamma)

    def run(self, frames: int, first: bool, outlet: Inlet) -> None:
        self.conv(self.window.filled(frames), Inlet(raw=self.partial.new(frames)))
        gather_taps(self.partial.filled(frames), self.bias, self.frames[:, :, :frames], self.bound)
        self.window.roll(frames)

    def windows(self) -> list[Window]:
        return [self.window]


def _widened(weight: Tensor, window: Window) -> Tensor:
    """[Cout, Cin, kh, kw] with zeros for the channels that the window has more."""
    return F.pad(weight, (0, 0, 0, 0, 0, window.buffer.shape[-1] - weight.shape[1]))
