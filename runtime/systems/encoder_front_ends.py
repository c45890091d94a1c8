"""The published encoders of words and sound, as values that know their models; see `front_ends`."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ...graphs.capture import Pool
from ..encoders.captured_states import CapturedStates
from ..encoders.live_audio import LiveAudioFeatures, LiveWindow
from ..encoders.wav2vec import Wav2Vec2Encoder
from .liveavatar_mode import GenerationMode

if TYPE_CHECKING:
    from ..encoders.text import TextEncoder


@dataclass(frozen=True)
class EncodedPrompt:
    """UMT5 rows [n, text_dim] of a prompt."""

    encoder: "TextEncoder"

    def __call__(self, prompt: str) -> Tensor:
        return self.encoder([prompt])[0]


def live_window(mode: GenerationMode) -> LiveWindow:
    """Steps of one block."""
    return LiveWindow(hop_frames=mode.block_frames, fps=mode.fps)


@dataclass(frozen=True)
class Wav2Vec2Speech:
    """All hidden states of a wav2vec 2.0."""

    encoder: Wav2Vec2Encoder

    def __call__(self, mode: GenerationMode) -> LiveAudioFeatures:
        return LiveAudioFeatures.of_wav2vec2(self.encoder, live_window(mode))

    def captured(self, memory: Pool | None, turn: AbstractContextManager[object]) -> "CapturedWav2Vec2Speech":
        return CapturedWav2Vec2Speech(CapturedStates(self.encoder, memory, turn))


@dataclass(frozen=True)
class CapturedWav2Vec2Speech:
    """The same from CUDA graphs, one for each length that a window of the mode has."""

    states: CapturedStates

    def __call__(self, mode: GenerationMode) -> LiveAudioFeatures:
        window = live_window(mode)
        self.states.record(window.lengths)
        return LiveAudioFeatures.of_wav2vec2(self.states, window)
