"""Speech features of a sound that is still being spoken: overlapping windows of a fixed grid (liveavatar.md 5.2).

The released live mode encodes each chunk alone, without context, and leaves the last frame of each chunk empty. Here
every step encodes some seconds of the past, the step itself and a short lookahead, and keeps the step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import InputError
from .audio_windows import FEATURE_RATE, WINDOW_RATE
from .captured_states import CapturedStates
from .wav2vec import SAMPLE_RATE, VARIANCE_EPS, Wav2Vec2Encoder

STRIDE = SAMPLE_RATE // FEATURE_RATE  # samples from one encoder frame to the next


@dataclass(frozen=True)
class LiveWindow:
    """What one step hears and gives. Latency = hop + lookahead, cost = one encoding of context + hop + lookahead.

    Context and lookahead are rounded to the encoder's 20 ms, and each is at least that: a frame of the 30 Hz grid may
    lie just outside of its step.
    """

    context_seconds: float = 4.0
    lookahead_seconds: float = 0.2
    hop_frames: int = 12
    fps: int = 25

    def __post_init__(self) -> None:
        if self.context < STRIDE or self.lookahead < STRIDE:
            raise ValueError(f"context_seconds and lookahead_seconds must be at least 0.02, got {self}")
        if self.hop_frames < 1 or not 0 < self.fps <= WINDOW_RATE:
            raise ValueError(f"hop_frames must be positive and fps lie in 1..{WINDOW_RATE}, got {self}")
        if self.hop_frames * SAMPLE_RATE % (self.fps * STRIDE):
            raise ValueError(
                f"{self.hop_frames} frames at {self.fps} fps are no whole number of encoder frames (20 ms); "
                "choose another hop_frames"
            )

    @property
    def hop(self) -> int:
        """Samples of a step."""
        return self.hop_frames * SAMPLE_RATE // self.fps

    @property
    def context(self) -> int:
        """Samples heard before a step."""
        return round(self.context_seconds * FEATURE_RATE) * STRIDE

    @property
    def lookahead(self) -> int:
        """Samples heard after a step."""
        return round(self.lookahead_seconds * FEATURE_RATE) * STRIDE

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples that the steps encode: more from step to step until the context is full, and then always as many."""
        filling = range(math.ceil(self.context / self.hop) + 1)
        return tuple(self.hop + self.lookahead + min(step * self.hop, self.context) for step in filling)


class LiveAudioFeatures:
    """Features per video frame of a growing sound, in the interface that every live front end has.

    `encode` is any frame encoder: samples [n] float32 at 16 kHz -> states [K, T, C] at 50 Hz, state k beginning at
    sample 320 k, in any floating dtype on any device. The steps lie on a fixed grid of `hop_frames` video frames and a
    step is computed when its lookahead is complete, so the result does not depend on how the sound is cut into pieces,
    bit for bit, and memory is flat.

    How this differs from the features of a whole file (`s2v_features` + `liveavatar_windows`):
    - a state attends to context + hop + lookahead instead of the whole sound;
    - the waveform is normalised by mean and variance of all sound heard up to the window's end, not of the file, so
      that room noise before the first word is amplified (`normalise` False leaves the waveform as it is);
    - video frame i takes the same frame b = round(30 i / fps) of the 30 Hz grid, but that grid is exact (position
      50 b / 30 among the encoder's frames), where the file's is stretched so that both ends meet: up to two thirds
      of an encoder frame (13 ms) at the end of a file;
    - at the end silence follows, and there are ceil(seconds * fps) frames instead of whole clips padded with zeros.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        states: int,
        channels: int,
        window: LiveWindow | None = None,
        *,
        normalise: bool = True,
    ):
        self.encode = encode
        self.shape = (states, channels)
        self.window = window or LiveWindow()
        self.normalise = normalise
        self.buffer = torch.zeros(0)  # the samples that the next step can hear
        self.first = 0  # index of buffer[0] in the stream
        self.steps = 0
        self.counted = 0  # samples in the two sums
        self.sum = 0.0
        self.square_sum = 0.0
        self.finished = False

    @classmethod
    def of_wav2vec2(
        cls, encoder: Wav2Vec2Encoder | CapturedStates, window: LiveWindow | None = None
    ) -> "LiveAudioFeatures":
        """All hidden states of a wav2vec 2.0: K = layers + 1, C = its width."""
        if encoder.size.stride != STRIDE:
            raise ValueError(f"the encoder steps {encoder.size.stride} samples; live audio needs {STRIDE}")
        return cls(encoder.stacked, encoder.size.states, encoder.size.dim, window)

    @property
    def samples(self) -> int:
        """Samples heard so far."""
        return self.first + len(self.buffer)

    def push(self, samples: Tensor) -> Tensor:
        """Mono samples [n] in [-1, 1] at 16 kHz, any n -> features [K, C, frames] of the steps now complete."""
        if self.finished:
            self._refuse("the sound was finished; start a new one")
        if samples.ndim != 1 or not samples.is_floating_point():
            self._refuse(f"expected floating-point samples [n], got {samples.dtype} {list(samples.shape)}")
        if not bool(torch.isfinite(samples).all()):
            self._refuse("the sound holds NaN or infinite samples; check the source")
        self.buffer = torch.cat((self.buffer, samples.float().cpu()))
        found = [torch.zeros(*self.shape, 0)]
        while self.samples >= self._end():
            found.append(self._step())
        return torch.cat(found, -1)

    def finish(self) -> Tensor:
        """The frames [K, C, frames] that are still due, as if silence followed; no samples are taken afterwards."""
        if self.finished:
            self._refuse("the sound was finished already")
        self.finished = True
        frames = math.ceil(self.samples * self.window.fps / SAMPLE_RATE)
        done = self.steps * self.window.hop_frames
        found = [torch.zeros(*self.shape, 0)]
        while self.steps * self.window.hop_frames < frames:
            found.append(self._step())
        self.buffer = self.buffer[:0].clone()
        return torch.cat(found, -1)[..., : frames - done]

    def _refuse(self, problem: str) -> NoReturn:
        raise InputError(f"live audio: {problem}")

    def _end(self) -> int:
        """First sample that the next step does not hear."""
        return (self.steps + 1) * self.window.hop + self.window.lookahead

    def _step(self) -> Tensor:
        """Encode the next step: [K, C, hop_frames]."""
        start = max(0, self.steps * self.window.hop - self.window.context)
        heard = self.buffer[start - self.first : self._end() - self.first]
        if self.normalise:
            self._count()
        wave = torch.nn.functional.pad(heard, (0, self._end() - start - len(heard)))
        states = self.encode(self._level(wave) if self.normalise else wave)
        if states.ndim != 3 or (states.shape[0], states.shape[2]) != self.shape:
            raise ValueError(f"the encoder gave {list(states.shape)}, expected [{self.shape[0]}, T, {self.shape[1]}]")
        features = self._at_frames(states, start // STRIDE)
        self.steps += 1
        keep = min(max(0, self.steps * self.window.hop - self.window.context) - self.first, len(self.buffer))
        self.buffer = self.buffer[keep:].clone()  # a slice would keep the whole sound alive
        self.first += keep
        return features

    def _count(self) -> None:
        """Add the sound that this step hears for the first time to the sums, in float64, in pieces of the grid."""
        until = min(self._end(), self.samples)
        fresh = self.buffer[self.counted - self.first : until - self.first].double()
        self.sum += float(fresh.sum())
        self.square_sum += float(fresh.square().sum())
        self.counted = max(self.counted, until)

    def _level(self, wave: Tensor) -> Tensor:
        mean = self.sum / max(self.counted, 1)
        variance = max(self.square_sum / max(self.counted, 1) - mean**2, 0.0)
        return (wave - mean) / math.sqrt(variance + VARIANCE_EPS)

    def _at_frames(self, states: Tensor, first_state: int) -> Tensor:
        """States [K, T, C], the first being `first_state` of the stream -> the step's frames [K, C, hop_frames]."""
        begin = self.steps * self.window.hop_frames
        frames = torch.arange(begin, begin + self.window.hop_frames, dtype=torch.float64)
        on_grid = torch.round(frames / self.window.fps * WINDOW_RATE)  # ties to even
        place = (on_grid * FEATURE_RATE / WINDOW_RATE - first_state).clamp(0, states.shape[1] - 1)
        left = place.floor().long()
        right = (left + 1).clamp(max=states.shape[1] - 1)
        weight = (place - left).float()[:, None]
        first = int(left[0])
        near = states[:, first : int(right[-1]) + 1].float().cpu()  # the context stays on the device
        picked = torch.lerp(near[:, left - first], near[:, right - first], weight)  # [K, hop_frames, C]
        return picked.transpose(1, 2)
