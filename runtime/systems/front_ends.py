"""What turns words and sound into conditions, as values that know their models, so that these can be written out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...graphs.models.speech import SpeechFrontEnd
from ..errors import InputError
from .audio_features import SpeechFeatures
from .liveavatar_mode import GenerationMode


@dataclass(frozen=True)
class FixedPrompt:
    """One prompt for every video: `rows` [n, text_dim].

    `words`: what the rows say; another prompt is then refused. None for a model that knows no words: all are taken.
    """

    rows: Tensor
    words: str | None = None

    def __call__(self, prompt: str) -> Tensor:
        if self.words is not None and prompt not in ("", self.words):
            raise InputError(
                f"this model was exported with the prompt {self.words!r} and without its text encoder; leave the "
                "prompt out, or export it again without --prompt"
            )
        return self.rows


@dataclass(frozen=True)
class SmallSpeech:
    """The small speech encoder of embedded models."""

    front_end: SpeechFrontEnd
    device: torch.device

    def __call__(self, mode: GenerationMode) -> SpeechFeatures:
        return SpeechFeatures(self.front_end, mode.block_frames, self.device)
