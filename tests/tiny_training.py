"""What the tests of the embedded model's training share: babble to speak, a small recipe, a front end."""

from dataclasses import replace

import numpy as np
import torch
from kinora.graphs.models.speech import SpeechConfig
from kinora.train.tiny.recipe import SMOKE, Recipe

RATE = 16_000
CPU = torch.device("cpu")
SPEECH = SpeechConfig(mels=40, channels=16, layers=3, lookahead=4)


def bank(count: int, seconds: float, seed: int = 0) -> torch.Tensor:
    """Babble int16 [count, samples]: a hummed vowel in syllables of changing pitch and length, so that mouths move."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    waves = []
    for _ in range(count):
        pitch = generator.uniform(90, 220)
        syllables = np.sin(2 * np.pi * generator.uniform(1.5, 4) * time + generator.uniform(0, 6)).clip(0, None)
        voice = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 16))
        waves.append(6000 * syllables * voice / np.abs(voice).max())
    return torch.from_numpy(np.stack(waves).astype(np.int16))


def small(**changes) -> Recipe:
    return replace(SMOKE, size=32, **changes)
