"""Sizes and schedule of the embedded `tiny` model: LiveAvatar's architecture, small enough to ship with the code."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One training stage: optimiser steps, clips a step, peak learning rate."""

    steps: int
    batch: int
    rate: float
    warmup: int = 200
    report_every: int = 100
    save_every: int = 400


@dataclass(frozen=True)
class Recipe:
    """Everything that a run of `python -m kinora.train.tiny` depends on, beside the seed.

    `blocks` counts denoising blocks a clip (12 frames each), `preroll` the frames before a clip that only the
    VAE sees, `still` the frames of the picture that are encoded as motion frames. A pool of `pool` encoded
    clips gets `refill` new ones every `refill_every` steps.
    """

    size: int = 192
    vae_dim: int = 32
    dim: int = 256
    heads: int = 8
    layers: int = 6
    blocks: int = 4
    preroll: int = 17
    still: int = 17
    utterances: int = 800
    utterance_seconds: float = 10.0
    pool: int = 4096
    refill: int = 32
    refill_every: int = 8
    vae_pieces: int = 5
    vae_crop: int = 128
    vae: Stage = field(default_factory=lambda: Stage(steps=9000, batch=10, rate=2e-3))
    flow: Stage = field(default_factory=lambda: Stage(steps=2400, batch=64, rate=1.2e-3))
    rollout: Stage = field(default_factory=lambda: Stage(steps=240, batch=64, rate=4e-4, save_every=120))

    @property
    def vae_frames(self) -> int:
        """Frames of the clips that the VAE is trained on, a piece of 16 (the first of 17) at a time."""
        return 1 + 16 * self.vae_pieces

    @property
    def clip_frames(self) -> int:
        return 12 * self.blocks


FULL = Recipe()
SMOKE = Recipe(
    size=64,
    vae_dim=4,
    dim=48,
    heads=2,
    layers=2,
    blocks=2,
    vae_crop=32,
    vae_pieces=2,
    utterances=4,
    utterance_seconds=6.0,
    pool=8,
    refill=2,
    vae=Stage(steps=6, batch=1, rate=1e-3, warmup=2, report_every=2, save_every=3),
    flow=Stage(steps=6, batch=2, rate=1e-3, warmup=2, report_every=2, save_every=3),
    rollout=Stage(steps=4, batch=2, rate=5e-4, warmup=1, report_every=2, save_every=2),
)
PRESETS = {"full": FULL, "smoke": SMOKE}
