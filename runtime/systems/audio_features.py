"""Sound -> speech features at the video's frame rate, piece by piece."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...graphs.capture import Pool
from ...graphs.models.speech import SpeechFrontEnd, to_video_rate
from ...graphs.models.speech_features import HOP, MARGIN, levelled_log_mel
from .liveavatar_mode import GenerationMode

MEL_PER_FRAME = 2  # 50 Hz features, 25 fps video
FRAME_SAMPLES = MEL_PER_FRAME * HOP
SILENT_MEL = -1.0  # levelled log-mel of digital silence


class AudioFeatures(Protocol):
    """Features of a growing sound; the result does not depend on how the sound is cut into pieces.

    Shapes: samples [n] float32 at 16 kHz; features [K, C, frames], K hidden states of C channels per video frame.
    """

    def push(self, samples: Tensor) -> Tensor:
        """Features of the frames that have become computable, possibly none."""
        ...

    def finish(self) -> Tensor:
        """The remaining frames, as if silence followed; the object takes no more samples afterwards."""
        ...


@runtime_checkable
class CapturableSpeech(Protocol):
    """A front end (mode -> extractor) whose extractors can run as CUDA graphs."""

    def captured(
        self, memory: Pool | None, turn: AbstractContextManager[object]
    ) -> Callable[[GenerationMode], AudioFeatures]:
        """The same values from graphs in shared `memory`, which hold `turn` while they work.

        What a mode needs is recorded before its first extractor is given out.
        """
        ...


class SpeechFeatures:
    """Features of `SpeechFrontEnd`, computed in units of one block so that every unit has the same shapes.

    Equal shapes make equal bytes: the kernels behind a convolution may sum in another order for another length.
    """

    def __init__(self, front_end: SpeechFrontEnd, block_frames: int, device: torch.device):
        self.front_end = front_end
        self.unit = MEL_PER_FRAME * block_frames
        self.device = device
        config = front_end.config
        self.context = config.left_context + config.lookahead
        self.wave = torch.zeros(MARGIN)  # sound not yet covered by mel frames, with the margin before it
        self.mel = torch.full((config.left_context, config.mels), SILENT_MEL)
        self.level: Tensor | None = None
        self.samples = 0
        self.frames = 0

    @torch.inference_mode()
    def push(self, samples: Tensor) -> Tensor:
        self.samples += len(samples)
        self.wave = torch.cat((self.wave, samples.float().cpu()))
        found, start, needed = [self.mel], 0, FRAME_SAMPLES + 2 * MARGIN
        while len(self.wave) - start >= needed:
            mel, self.level = levelled_log_mel(
                self.wave[start : start + needed], self.level, n_mels=self.front_end.config.mels, padded=True
            )
            found.append(mel)
            start += FRAME_SAMPLES
        self.wave = self.wave[start:].clone()  # a slice would keep the whole piece alive
        features = self._encode(torch.cat(found))
        self.frames += features.shape[-1]
        return features

    def _encode(self, mel: Tensor) -> Tensor:
        """[T, mels] -> [K, C, frames] of the whole units in it; what is left waits in `self.mel`."""
        config = self.front_end.config
        features, start = [mel.new_zeros(config.layers, config.channels, 0)], 0
        while len(mel) - start >= self.unit + self.context:
            window = mel[start : start + self.unit + self.context].to(self.device)
            features.append(to_video_rate(self.front_end(window[None]))[0].cpu())  # [K, C, block_frames]
            start += self.unit
        self.mel = mel[start:].clone()
        return torch.cat(features, -1)

    def finish(self) -> Tensor:
        left = math.ceil(self.samples / FRAME_SAMPLES) - self.frames
        silence = (MEL_PER_FRAME * left + self.unit + self.context) * HOP
        return self.push(torch.zeros(silence))[..., :left]
