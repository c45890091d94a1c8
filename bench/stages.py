"""Where the time of a session goes: the parts that it calls, each timed with the GPU waited for before and after.

Waiting takes time of its own, so a session that is timed as a whole is another one.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..graphs.models.wan_vae import DecoderState
from ..runtime.placement.base import Engine, Placement
from ..runtime.systems.audio_features import AudioFeatures
from ..runtime.systems.codec import VideoCodec
from ..runtime.systems.liveavatar import Denoiser, LiveAvatarSystem
from ..runtime.systems.liveavatar_mode import GenerationMode
from ..runtime.systems.liveavatar_step import BlockInputs

R = TypeVar("R")


class Stages:
    """Seconds by phase (what the session is doing, `phase`) and stage, summed over calls."""

    def __init__(self, device: torch.device):
        self.device = device
        self.phase = "opening"
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    def timed(self, stage: str, function: Callable[..., R]) -> Callable[..., R]:
        """`function`, its calls counted to `stage`."""

        @wraps(function)
        def run(*args: Any, **options: Any) -> R:
            self._wait()
            started = time.perf_counter()
            result = function(*args, **options)
            self._wait()
            self.seconds[self.phase, stage] += time.perf_counter() - started
            return result

        return run

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def system(self, system: LiveAvatarSystem) -> LiveAvatarSystem:
        """The same system, its prompt timed."""
        return replace(system, encode_prompt=self.timed("prompt", system.encode_prompt))

    def placement(self, placement: Placement) -> "TimedPlacement":
        return TimedPlacement(placement, self)


class TimedFeatures:
    def __init__(self, features: AudioFeatures, stages: Stages):
        self.push = stages.timed("audio features", features.push)
        self.finish = stages.timed("audio features", features.finish)


class TimedPlacement:
    """A placement whose engines and speech features are timed."""

    def __init__(self, placement: Placement, stages: Stages):
        self.turn = placement.turn
        self.keep = placement.keep
        self.stages = stages
        self._features = placement.audio_features
        self._open = stages.timed("engine", placement.open)

    def audio_features(self, mode: GenerationMode) -> TimedFeatures:
        return TimedFeatures(self._features(mode), self.stages)

    def open(self, context: Tensor, mode: GenerationMode, grid: tuple[int, int]) -> Engine:
        engine = self._open(context, mode, grid)
        return TimedEngine(
            TimedCodec(engine.vae, self.stages), TimedDenoiser(engine.denoiser, self.stages), engine.turn, engine
        )


@dataclass
class TimedEngine:
    vae: VideoCodec
    denoiser: Denoiser
    turn: AbstractContextManager[object]
    engine: Engine

    def release(self) -> None:
        self.engine.release()


class TimedCodec:
    def __init__(self, vae: VideoCodec, stages: Stages):
        self.config = vae.config
        self._encode = stages.timed("VAE encode", vae.encode)
        self._decode = stages.timed("VAE decode", vae.decode)
        self._decode_stream = stages.timed("VAE decode", vae.decode_stream)

    def encode(self, video: Tensor, /) -> Tensor:
        return self._encode(video)

    def decode(self, latents: Tensor, /) -> Tensor:
        return self._decode(latents)

    def decode_stream(self, latents: Tensor, state: DecoderState, /) -> Tensor:
        return self._decode_stream(latents, state)


class TimedDenoiser:
    def __init__(self, denoiser: Denoiser, stages: Stages):
        self._condition = stages.timed("condition", denoiser.condition)
        self._denoise = stages.timed("denoise", denoiser.denoise)
        self._drain = stages.timed("denoise", denoiser.drain)

    def condition(self, reference: Tensor, motion: Tensor) -> None:
        self._condition(reference, motion)

    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor | None:
        return self._denoise(x, block)

    def drain(self) -> list[Tensor]:
        return self._drain()
