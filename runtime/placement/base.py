"""How a session gets what it runs on, whichever the placement is."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ..systems.audio_features import AudioFeatures
from ..systems.codec import VideoCodec
from ..systems.liveavatar import Denoiser
from ..systems.liveavatar_mode import GenerationMode


class Engine(Protocol):
    """What one session runs on. `turn`: held around its work, where engines cannot work at the same time."""

    @property
    def vae(self) -> VideoCodec: ...

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def turn(self) -> AbstractContextManager[object]: ...

    def release(self) -> None:
        """Give it back; the session must not use it afterwards."""
        ...


class Placement(Protocol):
    """Where the sessions of one avatar run."""

    @property
    def turn(self) -> AbstractContextManager[object]: ...

    def open(self, context: Tensor, mode: GenerationMode, grid: tuple[int, int]) -> Engine:
        """An engine for a prompt [n, text_dim] and latents of (rows, columns)."""
        ...

    def audio_features(self, mode: GenerationMode) -> AudioFeatures:
        """A fresh extractor of speech features for one video in a mode."""
        ...

    def keep(self, sessions: int) -> None:
        """How many engines to keep for later sessions at least."""
        ...
