"""A small trainable speech encoder with a bounded receptive field: levelled log-mel frames -> hidden states at 50 Hz.

It stands where wav2vec 2.0 stands in the published systems and gives what the causal audio encoder of LiveAvatar
expects: K hidden states per frame. Because the receptive field is bounded, the features of a stream are exactly
those of the whole file.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = 3


@dataclass(frozen=True)
class SpeechConfig:
    """Sizes of the front end; `lookahead` counts 20 ms frames of the future that a feature may see."""

    mels: int = 40
    channels: int = 64
    layers: int = 5
    lookahead: int = 4

    @property
    def left_context(self) -> int:
        """Frames of the past that a feature sees: dilations 1, 2, 4, ... with kernel 3, less the lookahead."""
        return (KERNEL - 1) * (2**self.layers - 1) - self.lookahead


class SpeechLayer(nn.Module):
    """Dilated convolution over time without padding, GELU, projection; residual."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv1d(channels, 2 * channels, KERNEL, dilation=dilation)
        self.out = nn.Conv1d(2 * channels, channels, 1)
        self.trim = (KERNEL - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T - trim]; frame t of the result ends at frame t + trim of the input."""
        normed = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x[..., self.trim :] + self.out(F.gelu(self.conv(normed)))


class SpeechFrontEnd(nn.Module):
    """Levelled log-mel frames [B, T + left_context + lookahead, mels] -> hidden states [B, K, C, T], K = layers."""

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.mels, config.channels)
        self.layers = nn.ModuleList(SpeechLayer(config.channels, 2**i) for i in range(config.layers))

    def forward(self, mel: Tensor) -> Tensor:
        context = self.config.left_context + self.config.lookahead
        if mel.ndim != 3 or mel.shape[1] <= context or mel.shape[2] != self.config.mels:
            raise ValueError(
                f"speech front end: got {tuple(mel.shape)}; it takes [B, T + {context}, {self.config.mels}] with T >= 1"
            )
        x = self.project(mel).transpose(1, 2)  # [B, C, T + context]
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        frames = x.shape[-1]
        return torch.stack([state[..., -frames:] for state in states], 1)  # [B, K, C, T]


def to_video_rate(states: Tensor) -> Tensor:
    """Mean of the two 20 ms frames of each 25 fps video frame: [B, K, C, 2 n] -> [B, K, C, n]."""
    if states.shape[-1] % 2:
        raise ValueError(f"{states.shape[-1]} frames at 50 Hz do not make whole video frames; pass an even number")
    return states.unflatten(-1, (-1, 2)).mean(-1)
