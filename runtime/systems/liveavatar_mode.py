"""How LiveAvatar generates: steps, blocks, and where the released pipelines differ, as data.

Upstream has three copies of its loop; they differ in the reference latent, the motion frames, whether the condition
("sink") is made anew at clip 1, and in the context of the VAE decoder (liveavatar.md, 3.2 and 3.5 to 3.7).
"""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import SupportsIndex

from ..errors import InputError
from ..samplers import Schedule, euler_schedule

AUDIO_RATE = 16_000  # samples per second


class Resink(Enum):
    """What replaces the still picture in the condition before clip 1."""

    NEVER = "never"
    REFERENCE = "reference"  # the first generated latent
    REFERENCE_AND_MOTION = "reference_and_motion"  # and a motion video that ends with the first generated frames


class Decoding(Enum):
    """What the VAE decoder sees before a block."""

    STREAM = "stream"  # everything since the start of the video, through its caches
    CLIP = "clip"  # per clip: the encoding of a sliding window of pixel frames


@dataclass(frozen=True)
class GenerationMode:
    """One way of running the model; frames are pixel frames unless they are called latents.

    - `steps` denoising steps, `sample_shift` of the flow-matching schedule.
    - a block is `block_latents`, a clip `clip_blocks` blocks: the unit of noise seeds and pose videos.
    - `cache_latents`: length of each step's rolling cache, None for the model's own.
    - the reference is latent `reference_index` of `reference_frames` copies of the picture; the motion latents
      encode `motion_frames` copies.
    - `drop_first_frames` of a video are never shown; with `aligned` the sound is delayed by as many frames, so that
      shown frame i belongs to the sound at i / fps. Upstream does not delay it (lips lead by 0.12 s).
    - `near_distance`, `far_distance`: range of R, the frames by which the reference stays ahead of a block.
    """

    steps: int = 4
    sample_shift: float = 3.0
    block_latents: int = 3
    clip_blocks: int = 4
    cache_latents: int | None = None
    reference_frames: int = 5
    reference_index: int = 1
    motion_frames: int = 365
    resink: Resink = Resink.NEVER
    decoding: Decoding = Decoding.STREAM
    warm_latents: int = 7
    slide_frames: int = 73
    drop_first_frames: int = 3
    aligned: bool = True
    near_distance: int = 4
    far_distance: int = 30

    fps = 25  # what the models were trained for, and what the audio windows are cut to
    frames_per_latent = 4

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "block_latents",
            "clip_blocks",
            "reference_frames",
            "motion_frames",
            "warm_latents",
            "slide_frames",
        )
        others = ("cache_latents", "reference_index", "drop_first_frames", "near_distance", "far_distance")
        for name in (*counts, *others):
            value = getattr(self, name)
            if not isinstance(value, SupportsIndex) and (name, value) != ("cache_latents", None):
                raise InputError(f"{name} is {value!r}; it must be a whole number")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.cache_latents is not None and (self.cache_latents < 1 or self.cache_latents % self.block_latents):
            raise InputError(
                f"the cache must hold whole blocks: {self.cache_latents} is no multiple of {self.block_latents}"
            )
        if not 0 <= self.drop_first_frames < self.block_frames:
            raise InputError(f"drop_first_frames must be in 0..{self.block_frames - 1}, not {self.drop_first_frames}")
        if not 0 <= self.reference_index <= (self.reference_frames - 1) // self.frames_per_latent:
            raise InputError(f"{self.reference_frames} frames have no latent frame {self.reference_index}")
        if self.resink is Resink.REFERENCE_AND_MOTION and self.decoding is not Decoding.CLIP:
            raise InputError("a new motion condition needs decoded clips; use Decoding.CLIP or Resink.REFERENCE")
        if not 0 <= self.near_distance <= self.far_distance:
            raise InputError(f"the range {self.near_distance}..{self.far_distance} of reference distances is empty")

    @property
    def block_frames(self) -> int:
        return self.block_latents * self.frames_per_latent

    @property
    def clip_frames(self) -> int:
        return self.block_frames * self.clip_blocks

    def schedule(self) -> Schedule:
        """Noise levels of the steps (liveavatar.md, 3.4)."""
        return euler_schedule(self.steps, self.sample_shift)

    @property
    def samples_per_frame(self) -> int:
        return AUDIO_RATE // self.fps

    @property
    def lead_frames(self) -> int:
        """Frames of silence put before the sound."""
        return self.drop_first_frames if self.aligned else 0

    def frames_for(self, samples: int) -> int:
        """Video frames that cover `samples` of sound: the next whole number."""
        return math.ceil(samples / self.samples_per_frame)

    def blocks_for(self, frames: int) -> int:
        """Blocks to generate until `frames` frames are shown: whole clips where clips are decoded."""
        if not frames:
            return 0
        blocks = math.ceil((frames + self.drop_first_frames) / self.block_frames)
        whole = self.clip_blocks if self.decoding is Decoding.CLIP else 1
        return math.ceil(blocks / whole) * whole


SINGLE = GenerationMode(decoding=Decoding.CLIP, aligned=False)
SINGLE_ONLINE = replace(SINGLE, resink=Resink.REFERENCE_AND_MOTION)
PIPELINE = GenerationMode(
    reference_frames=1, reference_index=0, motion_frames=73, resink=Resink.REFERENCE, aligned=False
)
PIPELINE_BLOCKWISE = replace(SINGLE, resink=Resink.REFERENCE, decoding=Decoding.STREAM)
STREAM = replace(PIPELINE, aligned=True)
