"""LiveAvatar: a picture and speech features become an endless video, block by block (liveavatar.md, 3).

One loop serves every released pipeline; `GenerationMode` holds how they differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...graphs.models.liveavatar import LiveAvatar
from ...graphs.models.wan_vae import WanVae
from ..errors import CheckpointError
from .audio_features import AudioFeatures
from .codec import VideoCodec
from .liveavatar_conditions import PoseTrack, motion_latents, reference_latent
from .liveavatar_decode import ClipDecoder, StreamDecoder
from .liveavatar_draws import Draws
from .liveavatar_mode import Decoding, GenerationMode, Resink
from .liveavatar_step import BlockInputs


class Denoiser(Protocol):
    """Where the denoising steps run: `placement.single.SingleDevice` and its relatives."""

    def condition(self, reference: Tensor, motion: Tensor) -> None:
        """Replace the condition of the blocks that follow; latents [1, 16, 1, h, w] and [1, 16, T, h, w]."""
        ...

    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor | None:
        """Noise [1, 16, block latents, h, w] of the next block -> the latents of the block that is finished now: this
        one, or where several are on their way an earlier one, or None."""
        ...

    def drain(self) -> list[Tensor]:
        """The latents of the blocks that are still on their way, oldest first; here there are none."""
        return []


class ImmediateDenoiser(Denoiser, Protocol):
    """Every block is finished when `denoise` returns."""

    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor: ...


@dataclass(frozen=True)
class LiveAvatarSystem:
    """The loaded models and how to run them.

    `encode_prompt`: prompt -> rows [n, text_dim]; `audio_features`: a fresh extractor for one video in a mode;
    `size`: (height, width) in pixels that the model was trained for, None to follow the picture within `max_area`.
    """

    dit: LiveAvatar
    vae: WanVae
    mode: GenerationMode
    encode_prompt: Callable[[str], Tensor]
    audio_features: Callable[[GenerationMode], AudioFeatures]
    size: tuple[int, int] | None = None
    max_area: int = 704 * 384

    def __post_init__(self) -> None:
        pairs = {
            "latent frames in a block": (self.dit.config.num_frames_per_block, self.mode.block_latents),
            "latent channels": (self.dit.config.in_dim, self.vae.config.z_dim),
            "frames in a latent frame": (self.vae.config.temporal_factor, self.mode.frames_per_latent),
        }
        for what, (one, other) in pairs.items():
            if one != other:
                raise CheckpointError(f"the parts of this model do not fit: {one} and {other} {what}")


class BlockStream:
    """The blocks of one video: each call of `next` gives one to the denoiser and decodes what that has finished.

    `pixels` [3, H, W] in [-1, 1]; `place` builds the denoiser from the latent (rows, columns); `draws` gives noise and
    reference distances; `actor_mask` [A, clip latents, H/16, W/16, 1] when several actors speak; `pose` a pose video.
    Nothing grows with the number of blocks.
    """

    def __init__(
        self,
        vae: VideoCodec,
        mode: GenerationMode,
        pixels: Tensor,
        place: Callable[[tuple[int, int]], Denoiser],
        draws: Draws,
        *,
        actor_mask: Tensor | None = None,
        pose: PoseTrack | None = None,
    ):
        self.mode = mode
        self.draws = draws
        self.actor_mask = actor_mask
        self.pose = pose
        self.index = 0
        self.size = pixels.shape[1:]
        reference = reference_latent(vae, pixels, mode)
        self.grid = reference.shape[3], reference.shape[4]
        self.motion = motion_latents(vae, pixels, mode)
        self.channels = reference.shape[1]
        self.denoiser = place(self.grid)
        self.denoiser.condition(reference, self.motion)
        self.decoder: StreamDecoder | ClipDecoder
        if mode.decoding is Decoding.STREAM:
            self.decoder = StreamDecoder(vae, self.motion, mode)
        else:
            self.decoder = ClipDecoder(vae, pixels, self.motion, mode)
        self.first_latent: Tensor | None = None
        self.noise: Tensor | None = None  # of the current clip [C, clip latents, h, w]
        self.pose_latents: Tensor | None = None  # likewise
        self._finished: list[tuple[Tensor, Tensor]] = []  # latents and frames of blocks, not handed out yet

    def next(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Audio features [A, K, C, block frames] -> latents [1, 16, n, h, w], frames [3, t, H, W] of what is finished.

        Frames are in [-1, 1]. That is this block (n = block latents; t is below a block at the start of the video), or
        what the denoiser gives instead: nothing, or earlier blocks. In `Decoding.CLIP` t is 0 until a clip is complete.
        """
        mode = self.mode
        clip, block = divmod(self.index, mode.clip_blocks)
        if block == 0:
            self._start_clip(clip)
        part = slice(block * mode.block_latents, (block + 1) * mode.block_latents)
        distances = tuple(self.draws.distance(self.index, step) for step in range(mode.steps))
        pose = None if self.pose_latents is None else self.pose_latents[:, :, part]
        inputs = BlockInputs(self.index, audio, distances, pose, self.actor_mask)
        assert self.noise is not None
        latents = self.denoiser.denoise(self.noise[None, :, part], inputs)
        self.index += 1
        if latents is not None:
            self._take(latents)
        return self._hand_out()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Latents and frames of the blocks that are still on their way; further blocks may follow."""
        for latents in self.denoiser.drain():
            self._take(latents)
        return self._hand_out()

    def _start_clip(self, clip: int) -> None:
        latents = self.mode.block_latents * self.mode.clip_blocks
        self.noise = self.draws.noise(clip, (self.channels, latents, *self.grid))
        self.pose_latents = self.pose.clip(clip) if self.pose else None
        if clip == 1 and self.mode.resink is not Resink.NEVER:
            self._renew_condition()

    def _renew_condition(self) -> None:
        """From what clip 0 became; blocks that are still on their way are waited for where that depends on them."""
        moves = self.mode.resink is Resink.REFERENCE_AND_MOTION
        if moves or self.first_latent is None:
            for latents in self.denoiser.drain():
                self._take(latents)
        assert self.first_latent is not None
        motion = self.motion
        if moves:
            assert isinstance(self.decoder, ClipDecoder)
            motion = self.decoder.context
        self.denoiser.condition(self.first_latent, motion)

    def _take(self, latents: Tensor) -> None:
        """Decode the next block that is finished."""
        if self.first_latent is None:
            self.first_latent = latents[:, :, :1]
        self._finished.append((latents, self.decoder.push(latents)))

    def _hand_out(self) -> tuple[Tensor, Tensor]:
        """Latents and frames of the blocks that were taken since the last call."""
        finished, self._finished = self._finished, []
        if not finished:
            return self.motion[:, :, :0], self.motion.new_zeros(3, 0, *self.size)
        if len(finished) == 1:
            return finished[0]
        latents, frames = zip(*finished, strict=True)
        return torch.cat(latents, 2), torch.cat(frames, 1)


def frames_to_bytes(frames: Tensor) -> Tensor:
    """[3, n, H, W] in [-1, 1] -> uint8 RGB [n, H, W, 3], truncated as upstream does (liveavatar.md, 3.8).

    Contiguous: the device reorders the bytes, since a copy to the host keeps strides and the host is slow at it.
    """
    return ((frames.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()
