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

    def condition(self, reference: Tensor, motion: Tensor) -> None: ...

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
    """The blocks of one video: each call of `next` denoises and decodes one.

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

    def next(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Audio features [A, K, C, block frames] -> latents [1, 16, block latents, h, w], frames [3, n, H, W].

        Frames are in [-1, 1]; n is below a block at the start of the video, and in `Decoding.CLIP` 0 until a clip is
        complete.
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
        if self.index == 0:
            self.first_latent = latents[:, :, :1]
        self.index += 1
        return latents, self.decoder.push(latents)

    def _start_clip(self, clip: int) -> None:
        latents = self.mode.block_latents * self.mode.clip_blocks
        self.noise = self.draws.noise(clip, (self.channels, latents, *self.grid))
        self.pose_latents = self.pose.clip(clip) if self.pose else None
        if clip == 1 and self.mode.resink is not Resink.NEVER:
            assert self.first_latent is not None
            motion = self.motion
            if self.mode.resink is Resink.REFERENCE_AND_MOTION:
                assert isinstance(self.decoder, ClipDecoder)
                motion = self.decoder.context
            self.denoiser.condition(self.first_latent, motion)


def frames_to_bytes(frames: Tensor) -> Tensor:
    """[3, n, H, W] in [-1, 1] -> uint8 RGB [n, H, W, 3], truncated as upstream does (liveavatar.md, 3.8).

    Contiguous: the device reorders the bytes, since a copy to the host keeps strides and the host is slow at it.
    """
    return ((frames.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()
