"""wav2vec 2.0 hidden states, through `transformers.Wav2Vec2Model` (wan.md 2.5, liveavatar.md 3.3)."""

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from ...checkpoints_tools.assign import assign_state
from ...checkpoints_tools.keymaps import wav2vec2_keymap
from ...checkpoints_tools.load import load_module
from ..errors import CheckpointError, InputError
from .audio_windows import resample_time
from .half_precision import rounded_once
from .loading import find_weights, open_checkpoint

SAMPLE_RATE = 16_000
VARIANCE_EPS = 1e-7


@dataclass(frozen=True)
class Wav2Vec2Size:
    """Sizes of the encoder. `stable` is the large variant: pre-norm layers and a norm after every convolution."""

    dim: int
    heads: int
    layers: int
    ffn: int
    stable: bool
    conv_channels: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: str = "group"
    position_kernel: int = 128
    position_groups: int = 16
    eps: float = 1e-5

    @property
    def states(self) -> int:
        """Hidden states: the input of the first layer and every layer's output."""
        return self.layers + 1

    @property
    def stride(self) -> int:
        """Samples from one encoder frame to the next."""
        return math.prod(self.conv_strides)

    @property
    def receptive_field(self) -> int:
        """Samples that one encoder frame reads."""
        reach = 1
        for kernel, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides), strict=True):
            reach = (reach - 1) * stride + kernel
        return reach

    def frames(self, samples: int) -> int:
        """Encoder frames of `samples` samples: every convolution drops what does not fill it."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return max(samples, 0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Wav2Vec2Size":
        """From the entries of a published `config.json`; raises KeyError for an absent one."""
        return cls(
            dim=config["hidden_size"],
            heads=config["num_attention_heads"],
            layers=config["num_hidden_layers"],
            ffn=config["intermediate_size"],
            stable=config["do_stable_layer_norm"],
            conv_channels=tuple(config["conv_dim"]),
            conv_kernels=tuple(config["conv_kernel"]),
            conv_strides=tuple(config["conv_stride"]),
            conv_bias=config["conv_bias"],
            conv_norm=config["feat_extract_norm"],
            position_kernel=config["num_conv_pos_embeddings"],
            position_groups=config["num_conv_pos_embedding_groups"],
            eps=config["layer_norm_eps"],
        )

    def to_transformers(self) -> Wav2Vec2Config:
        """The same sizes as a transformers configuration."""
        return Wav2Vec2Config(
            hidden_size=self.dim,
            num_attention_heads=self.heads,
            num_hidden_layers=self.layers,
            intermediate_size=self.ffn,
            do_stable_layer_norm=self.stable,
            conv_dim=self.conv_channels,
            conv_kernel=self.conv_kernels,
            conv_stride=self.conv_strides,
            conv_bias=self.conv_bias,
            feat_extract_norm=self.conv_norm,
            num_conv_pos_embeddings=self.position_kernel,
            num_conv_pos_embedding_groups=self.position_groups,
            layer_norm_eps=self.eps,
        )


WAV2VEC2_BASE = Wav2Vec2Size(dim=768, heads=12, layers=12, ffn=3072, stable=False)
WAV2VEC2_LARGE_XLSR = Wav2Vec2Size(
    dim=1024, heads=16, layers=24, ffn=4096, stable=True, conv_bias=True, conv_norm="layer"
)


def normalise_waveform(wave: Tensor, eps: float = VARIANCE_EPS) -> Tensor:
    """Zero mean and unit variance along the last axis (population variance), float32: (x - mean) / sqrt(var + eps)."""
    wave = wave.float()
    variance, mean = torch.var_mean(wave, -1, correction=0, keepdim=True)
    return (wave - mean) / torch.sqrt(variance + eps)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


_HOOKING = threading.Lock()
"""The states are seen by hooks on the layers, which another thread's call would set off too."""


class Wav2Vec2Encoder(nn.Module):
    """Normalised waveform -> all hidden states; eval mode, no gradients, no attention mask."""

    def __init__(self, size: Wav2Vec2Size):
        super().__init__()
        self.size = size
        self.model = Wav2Vec2Model(size.to_transformers()).eval().requires_grad_(False)

    def assign(
        self, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """Take the weights from a published state dict: bare or below `wav2vec2.`, old or new weight-norm names."""
        assign_state(self.model, state, wav2vec2_keymap(state), dtype=dtype, device=device)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Wav2Vec2Encoder":
        """From a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`; raises CheckpointError."""
        config = Path(folder) / "config.json"
        try:
            size = Wav2Vec2Size.from_config(json.loads(config.read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{config} is no configuration of wav2vec 2.0: {error!r}") from error
        with torch.device("meta"):
            encoder = cls(size)
        with open_checkpoint(find_weights(folder)) as weights:
            load_module(encoder.model, weights, wav2vec2_keymap(weights), dtype=dtype, device=device)
        return encoder

    @torch.no_grad()
    def conv_features(self, wave: Tensor) -> Tensor:
        """Normalised 16 kHz waveform [B, samples] -> [B, C, T50]."""
        if wave.ndim != 2:
            raise ValueError(f"expected a waveform [B, samples], got {list(wave.shape)}")
        if self.size.frames(wave.shape[1]) < 1:
            seconds = self.size.receptive_field / SAMPLE_RATE
            raise InputError(f"the sound has {wave.shape[1]} samples; it needs at least {seconds:.3f} s")
        weight = self.model.feature_extractor.conv_layers[0].conv.weight
        with rounded_once():
            return self.model.feature_extractor(wave.to(weight.dtype))

    @torch.no_grad()
    def encode(self, features: Tensor) -> list[Tensor]:
        """Convolution features [B, T, C] -> K = layers + 1 hidden states [B, T, D].

        Entry 0 enters the first layer; the last entry is the model's output (after the final norm when `stable`).
        """
        with _HOOKING:
            return self._encode(features)

    def _encode(self, features: Tensor) -> list[Tensor]:
        states: list[Tensor] = []
        layers = self.model.encoder.layers
        hooks = [layers[0].register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))]
        hooks += [
            layer.register_forward_hook(lambda module, inputs, out: states.append(_first(out))) for layer in layers
        ]
        try:
            with rounded_once():
                projected = self.model.feature_projection(features)[0]
                states_end = self.model.encoder(projected)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return [*states[:-1], states_end]

    def forward(self, wave: Tensor, frames: int | None = None) -> list[Tensor]:
        """Normalised waveform [B, samples] -> K hidden states [B, T, D].

        With `frames` the convolution features are first interpolated to that many (OmniAvatar, SkyReels); else
        T = T50, the encoder's own rate (LiveAvatar, StableAvatar).
        """
        features = self.conv_features(wave).transpose(1, 2)  # [B, T50, C]
        return self.encode(features if frames is None else resample_time(features, frames))

    def stacked(self, wave: Tensor) -> Tensor:
        """Normalised waveform [samples] on any device -> states [K, T50, D] in float32 on the CPU."""
        device = self.model.masked_spec_embed.device
        return torch.cat(self(wave[None].to(device))).float().cpu()
