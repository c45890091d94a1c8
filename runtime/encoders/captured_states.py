"""A speech encoder as CUDA graphs, one for each length of sound: launching took longer than encoding."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...graphs.capture import Pool, Replay
from .wav2vec import Wav2Vec2Encoder, Wav2Vec2Size

MOST_LENGTHS = 16  # recorded at most; a growing window of 4 s in steps of 0.48 s has 10


class CapturedStates:
    """`Wav2Vec2Encoder.stacked` for the lengths that were recorded; every other length runs launch by launch.

    On a CPU the same function runs as it is. `memory`: working memory that is shared with graphs which take turns,
    None for each graph's own; `turn`: held while a graph works and its buffers hold something.
    """

    def __init__(self, encoder: Wav2Vec2Encoder, memory: Pool | None, turn: AbstractContextManager[object]):
        self.encoder = encoder
        self.memory = memory
        self.turn = turn
        self.windows: dict[int, _Window] = {}

    @property
    def size(self) -> Wav2Vec2Size:
        return self.encoder.size

    @torch.inference_mode()
    def record(self, lengths: Iterable[int]) -> None:
        """Record sounds of `lengths` samples that are not yet recorded, the longest first, up to `MOST_LENGTHS` in all.

        They share their buffers.
        """
        with self.turn:
            room = MOST_LENGTHS - len(self.windows)
            new = sorted(set(lengths) - self.windows.keys(), reverse=True)[:room]
            if not new:
                return
            weight = self.encoder.model.feature_extractor.conv_layers[0].conv.weight
            wave = torch.zeros(1, new[0], device=weight.device)
            states = torch.empty(self._values(new[0]), dtype=weight.dtype, device=weight.device)
            for samples in new:
                part = states[: self._values(samples)].view(self.size.states, -1, self.size.dim)
                window = _Window(self.encoder, wave[:, :samples], part, self.memory)
                window.replay.record()
                self.windows[samples] = window

    @torch.inference_mode()
    def stacked(self, wave: Tensor) -> Tensor:
        """Normalised waveform [samples] on any device -> states [K, T50, D], on the encoder's device if recorded."""
        window = self.windows.get(len(wave))
        if window is None:
            return self.encoder.stacked(wave)
        with self.turn:
            window.wave.copy_(wave[None])
            window.replay()
            return window.states.clone()

    def _values(self, samples: int) -> int:
        return self.size.states * self.size.frames(samples) * self.size.dim


class _Window:
    """Static buffers of one length: `wave` [1, samples] float32, `states` [K, T50, D] in the encoder's dtype."""

    def __init__(self, encoder: Wav2Vec2Encoder, wave: Tensor, states: Tensor, memory: Pool | None):
        self.encoder = encoder
        self.wave = wave
        self.states = states
        self.replay = Replay(self._run, wave.device, memory)

    def _run(self) -> None:
        torch.cat(self.encoder(self.wave), out=self.states)
