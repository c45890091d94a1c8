"""Everything random in a video, from one seed and without state: noise by clip, reference distance by block and step.

Upstream seeds the noise of clip r with seed + r and draws the distances from an unseeded stream (liveavatar.md, 2.6
and 3.4); here any block can be drawn on any rank, and the same seed gives the same bytes.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .liveavatar_mode import GenerationMode


class Draws(Protocol):
    """Source of the random numbers of one video."""

    def noise(self, clip: int, shape: tuple[int, ...]) -> Tensor:
        """Gaussian noise of a whole clip, [C, latents, h, w]."""
        ...

    def distance(self, block: int, step: int) -> int:
        """R: by how many latent frames at least the reference stays ahead of this block in this step."""
        ...


class SeededDraws:
    """Draws that depend only on the seed, the clip, the block and the step."""

    def __init__(self, seed: int, mode: GenerationMode, dtype: torch.dtype, device: torch.device):
        self.seed = seed
        self.mode = mode
        self.dtype = dtype
        self.device = device

    def noise(self, clip: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed + clip)
        return torch.randn(*shape, generator=generator, dtype=self.dtype, device=self.device)

    def distance(self, block: int, step: int) -> int:
        counter = np.array([0, 0, step, block], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=self.seed % 2**64, counter=counter))
        return int(generator.integers(self.mode.near_distance, self.mode.far_distance, endpoint=True))
