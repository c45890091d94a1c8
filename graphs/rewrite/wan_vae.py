"""A `WanVae` as two streams of fused kernels over static memory, fit to be captured as CUDA graphs.

    decoder = StreamingDecoder(vae, rows=88, columns=48, latents=3)
    decoder.capture()                         # on a GPU: replay from the second chunk on
    frames = decoder.step(latents)            # [B, 3, t, 8 h, 8 w], static: read it before the next step

Results are those of `WanVae.decode_stream` / `encode_stream` from the same weights: to 1e-5 in float32; in half
precision, where products are summed and epilogues computed in float32, within 1e-2 a block of the float32 network.
Nothing waits for the GPU. After the first two chunks nothing is allocated outside of the caching allocator, and a
captured step allocates nothing at all. The weights are copied: later changes of the VAE are not seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture import Pool, Recording, record
from ..models.wan_vae import WanVae
from ..models.wan_vae_blocks import AttentionBlock, CausalConv3d, Downsample, ResidualBlock, Upsample
from .wan_vae_stages import Attention, Down, Inlet, PixelHead, Residual, Room, Scratch, Stage, Up, WindowConv


class _Stream(ABC):
    """Stages in a chain; subclasses fill the first inlet and read what the last one leaves."""

    def __init__(self, stages: Sequence[Stage], capacity: int, final: Tensor | None):
        """`capacity`: frames (of the first stage) in a steady step; `final`: raw output of the last stage."""
        self.stages = stages
        self.capacity = capacity
        self.first = True
        self._final = final
        self._graph: Recording | None = None

    def reset(self) -> None:
        """Start a new stream."""
        for stage in self.stages:
            for window in stage.windows():
                window.reset()
        self.first = True

    def _run(self, frames: int) -> int:
        """All stages on the frames that lie in the first inlet; frames that come out."""
        for stage, following in zip(self.stages, [*self.stages[1:], None], strict=True):
            count = stage.frames_out(frames, self.first)
            if following is not None:
                outlet = following.inlet(count, self.first)
            else:
                outlet = Inlet(raw=None if self._final is None else self._final[:, :count])
            stage.run(frames, self.first, outlet)
            frames = count
        return frames

    def _capture(self, static: Tensor, pool: Pool | None) -> None:
        """Record `_compute(static)` as it runs in the middle of a stream; the stream starts anew."""
        if not static.is_cuda:
            raise RuntimeError(f"CUDA graphs need a GPU, this stream lies on {static.device}; step() works without")
        self._graph = None
        self.first = False
        self._graph = record(lambda: self._compute(static), static.device, pool=pool)
        self.reset()

    @abstractmethod
    def _compute(self, given: Tensor) -> int:
        """One step, launch by launch; frames that come out."""

    def _advance(self, given: Tensor, static: Tensor) -> int:
        """One step, replayed if it is a full one in the middle of the stream; frames that come out."""
        if self._graph is not None and not self.first and given.shape == static.shape:
            static.copy_(given)
            self._graph.replay()
            return self._steady
        count = self._compute(given)
        self.first = False
        return count

    @property
    def _steady(self) -> int:
        frames = self.capacity
        for stage in self.stages:
            frames = stage.frames_out(frames, False)
        return frames


class StreamingDecoder(_Stream):
    """Latents -> frames. `rows`, `columns` of the latents; at most `latents` latent frames a step."""

    @torch.no_grad()
    def __init__(
        self,
        vae: WanVae,
        rows: int,
        columns: int,
        latents: int = 3,
        batch: int = 1,
        bound: float | None = 1.0,
        scratch: Scratch | None = None,
    ):
        """`bound`: clamp the frames to [-bound, bound], None: do not. `scratch`: memory shared with other streams of
        this VAE, which then must take their steps one after another; None for its own."""
        config, decoder = vae.config, vae.decoder
        head: Any = decoder.head
        like = vae.conv2.weight.new_empty(0)
        room = Room(batch, latents, rows, columns, like)
        stages: list[Stage] = [WindowConv(decoder.conv1, room)]
        scratch = scratch or Scratch()
        for block in (*decoder.middle, *decoder.upsamples):
            stages.append(_stage(block, room, scratch))
            room = _room_after(stages[-1], block, room)
        factor = config.spatial_factor
        shape = (batch, 3, latents * config.temporal_factor, rows * factor, columns * factor)
        self.frames = torch.empty(shape, device=like.device)
        stages.append(PixelHead(head["0"], head["2"], room, self.frames, bound, scratch))
        super().__init__(stages, latents, None)
        self.latents = torch.zeros(batch, config.z_dim, latents, rows, columns, device=like.device)
        mean, inverse = (value.float().flatten() for value in vae.latent_scale(like.device))
        weight = vae.conv2.weight.float().flatten(1)  # [z, z]
        self._enter = (weight / inverse, vae.conv2.bias.float() + weight @ mean)  # conv2 after the denormalisation

    @torch.no_grad()
    def step(self, latents: Tensor) -> Tensor:
        """The next 1 ... `latents` latent frames [B, z, n, h, w] -> their frames [B, 3, t, 8 h, 8 w], float32.

        The first latent frame of a stream gives one frame, every other four. The result is a view of `frames`: the
        next step overwrites it. ValueError for another size, or more frames than there is room for.
        """
        given, own = tuple(latents.shape), tuple(self.latents.shape)
        if latents.dim() != 5 or given[:2] + given[3:] != own[:2] + own[3:] or not 1 <= given[2] <= own[2]:
            raise ValueError(f"latents have shape {given}; this decoder takes {own}, or fewer frames (the third size)")
        return self.frames[:, :, : self._advance(latents, self.latents)]

    @torch.no_grad()
    def capture(self, pool: Pool | None = None) -> None:
        """Record the steady step of all `latents` frames as a CUDA graph, which `step` then replays; starts anew.

        `pool`: working memory shared with other graphs, None for its own. RuntimeError without a GPU.
        """
        self._capture(self.latents, pool)

    def _compute(self, given: Tensor) -> int:
        count = given.shape[2]
        place = self.stages[0].inlet(count, self.first).raw
        assert place is not None
        place.copy_(F.linear(given.permute(0, 2, 3, 4, 1).float(), *self._enter))
        return self._run(count)


class StreamingEncoder(_Stream):
    """Frames -> normalised mean latents. `rows`, `columns` of the frames; at most `latents` latent frames a step."""

    @torch.no_grad()
    def __init__(
        self,
        vae: WanVae,
        rows: int,
        columns: int,
        latents: int = 3,
        batch: int = 1,
        scratch: Scratch | None = None,
    ):
        """`scratch` as in `StreamingDecoder`. ValueError for frames that are no multiple of the VAE's factor."""
        config, encoder = vae.config, vae.encoder
        norm: Any = encoder.head["0"]
        if rows % config.spatial_factor or columns % config.spatial_factor:
            raise ValueError(f"frames of {rows}x{columns}: both must be multiples of {config.spatial_factor}")
        like = vae.conv1.weight.new_empty(0)
        self._factor = config.temporal_factor
        room = Room(batch, latents * self._factor, rows, columns, like)
        stages: list[Stage] = [WindowConv(encoder.conv1, room)]
        scratch = scratch or Scratch()
        for block in (*encoder.downsamples, *encoder.middle):
            stages.append(_stage(block, room, scratch))
            room = _room_after(stages[-1], block, room)
        stages.append(WindowConv(_latent_head(vae), room, norm))
        self._mean = torch.empty(batch, latents, room.height, room.width, config.z_dim, device=like.device)
        super().__init__(stages, latents * self._factor, self._mean)
        self.video = torch.zeros(batch, 3, latents * self._factor, rows, columns, device=like.device)
        self.latents = torch.empty(batch, config.z_dim, latents, room.height, room.width, device=like.device)

    @torch.no_grad()
    def step(self, video: Tensor) -> Tensor:
        """The next frames [B, 3, t, H, W] in [-1, 1] -> their latents [B, z, n, H / 8, W / 8], float32.

        The first step takes 1 + 4 m frames, every other 4 m. The result is a view of `latents`: the next step
        overwrites it. ValueError for another size or number of frames.
        """
        given, own = tuple(video.shape), tuple(self.video.shape)
        if video.dim() != 5 or given[:2] + given[3:] != own[:2] + own[3:] or not 1 <= given[2] <= own[2]:
            raise ValueError(f"video has shape {given}; this encoder takes {own}, or fewer frames (the third size)")
        if given[2] % self._factor != (1 % self._factor if self.first else 0):
            raise ValueError(
                f"{given[2]} frames do not complete a latent frame: a stream starts with 1 + a multiple of "
                f"{self._factor} frames and goes on with multiples"
            )
        return self.latents[:, :, : self._advance(video, self.video)]

    @torch.no_grad()
    def capture(self, pool: Pool | None = None) -> None:
        """Record the steady step of 4 * `latents` frames as a CUDA graph, which `step` then replays; starts anew.

        `pool`: working memory shared with other graphs, None for its own. RuntimeError without a GPU.
        """
        self._capture(self.video, pool)

    def _compute(self, given: Tensor) -> int:
        place = self.stages[0].inlet(given.shape[2], self.first).raw
        assert place is not None
        place.copy_(given.permute(0, 2, 3, 4, 1))
        count = self._run(given.shape[2])
        self.latents[:, :, :count].copy_(self._mean[:, :count].permute(0, 4, 1, 2, 3))
        return count


def _latent_head(vae: WanVae) -> CausalConv3d:
    """The encoder's last convolution, the mean's half of `conv1` and the normalisation as one convolution."""
    z = vae.config.z_dim
    last, mix = vae.encoder.head["2"], vae.conv1
    assert isinstance(last, CausalConv3d)
    mean, inverse = (value.double().flatten() for value in vae.latent_scale(mix.weight.device))
    mixing = mix.weight.double().flatten(1)[:z]  # [z, 2z]
    folded = CausalConv3d(last.in_channels, z, 3, padding=1).to(last.weight)
    weight = torch.einsum("zm,mcthw->zcthw", mixing, last.weight.double()) * inverse[:, None, None, None, None]
    folded.weight.copy_(weight)
    folded.bias.copy_((mixing @ last.bias.double() + mix.bias.double()[:z] - mean) * inverse)
    return folded


def _stage(block: torch.nn.Module, room: Room, scratch: Scratch) -> Stage:
    """The stage of a block; blocks of equal size and width share their memory."""
    if isinstance(block, Upsample):
        return Up(block, room, scratch)
    if isinstance(block, Downsample):
        return Down(block, room, scratch)
    if isinstance(block, ResidualBlock):
        first: Any = block.residual["0"]
        return Residual(block, room, room.stream(len(first.gamma), scratch), scratch)
    if isinstance(block, AttentionBlock):
        return Attention(block, room, room.stream(len(block.norm.gamma), scratch))
    raise TypeError(f"a {type(block).__name__} is no block of the Wan VAE")


def _room_after(stage: Stage, block: torch.nn.Module, room: Room) -> Room:
    """Size of what a stage gives."""
    height, width = room.height, room.width
    if isinstance(block, Upsample):
        height, width = 2 * height, 2 * width
    if isinstance(block, Downsample):
        height, width = height // 2, width // 2
    return Room(room.batch, stage.frames_out(room.frames, False), height, width, room.like)
