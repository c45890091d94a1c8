"""Audio in LiveAvatar: causal encoder of a block's audio, injection into the video tokens (liveavatar.md, 2.8).

Legend: N = batch x actors (sample-major), F latent frames, T = 4 F audio frames, J injection layers.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from .layers import Linear
from .liveavatar_block import CrossAttention
from .liveavatar_cache import KeyValue

AUDIO_FRAMES_PER_LATENT = 4


class CausalConv1d(nn.Module):
    """Convolution over time that sees only the past (the first frame repeated on the left); always in float32.

    A block has so few frames that reading the weights is the work: as one product, where they lie.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, ceil(T / stride), C']."""
        conv, (kernel,), (stride,) = self.conv, self.conv.kernel_size, self.conv.stride
        padded = torch.cat((x[:, :1].expand(-1, kernel - 1, -1), x), 1)
        windows = padded.unfold(1, kernel, stride).flatten(2)  # [B, T', C * kernel]
        bias = None if conv.bias is None else conv.bias.float()
        return F.linear(windows, conv.weight.float().flatten(1), bias)


class MotionEncoder(nn.Module):
    """Two causal branches with a common trunk: `num_token` local tokens and one global token a latent frame."""

    def __init__(self, audio_dim: int, dim: int, num_token: int):
        super().__init__()
        self.conv1_local = CausalConv1d(audio_dim, num_token * (dim // 4))
        self.conv1_global = CausalConv1d(audio_dim, dim // 4)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = Linear(dim, dim, island=True)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.num_token = num_token

    def _trunk(self, x: Tensor) -> Tensor:
        x = F.silu(ops.layer_norm(x))
        x = F.silu(ops.layer_norm(self.conv2(x)))
        return F.silu(ops.layer_norm(self.conv3(x)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, T, audio_dim] float32 -> local [N, F, num_token + 1, D], global [N, F, 1, D], F = ceil(T / 4)."""
        first = torch.cat((self.conv1_local(x), self.conv1_global(x)), -1).unflatten(-1, (self.num_token + 1, -1))
        tokens = self._trunk(first.transpose(1, 2).flatten(0, 1))  # [N*(n+1), F, D]: its weights are read once
        tokens = tokens.unflatten(0, (-1, self.num_token + 1)).transpose(1, 2)  # [N, F, n+1, D]
        local, whole = tokens.split((self.num_token, 1), 2)
        padding = self.padding_tokens.float().expand(*local.shape[:2], 1, -1)
        return torch.cat((local, padding), 2), self.final_linear(whole)


class CausalAudioEncoder(nn.Module):
    """Learned mix of the audio model's hidden states, then `MotionEncoder`; float32 inside."""

    def __init__(self, audio_dim: int, audio_layers: int, dim: int, num_token: int):
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, audio_layers, 1, 1), 0.01))
        self.encoder = MotionEncoder(audio_dim, dim, num_token)

    def mix(self, features: Tensor) -> Tensor:
        """Hidden states [N, layers, audio_dim, T] -> their weighted mean [N, T, audio_dim] in float32."""
        weights = F.silu(self.weights)
        mixed = ((features * weights).float() / weights.float().sum()).sum(1)
        return mixed.transpose(1, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, layers, audio_dim, 4F] -> local [N, F, n + 1, D], global [N, F, 1, D] in the features' dtype.

        Upstream repeats the first frame 73 times in front and drops 19 results; one repetition gives the same.
        """
        layers, channels, length = features.shape[1:]
        expected = (self.weights.shape[1], self.encoder.conv1_global.conv.in_channels)
        if (layers, channels) != expected:
            raise ValueError(
                f"audio features have (layers, channels) {(layers, channels)}; this model needs {expected}"
            )
        if length == 0 or length % AUDIO_FRAMES_PER_LATENT:
            raise ValueError(
                f"the audio window has {length} frames; pass {AUDIO_FRAMES_PER_LATENT} per latent frame of the block"
            )
        prefixed = torch.cat((features[..., :1], features), -1)
        local, whole = self.encoder(self.mix(prefixed))
        return local[:, 1:].to(features.dtype), whole[:, 1:].to(features.dtype)


class Injection(NamedTuple):
    """What one injection layer needs of the audio: modulation [N*F, 1, D] (None without AdaIN), keys and values."""

    shift: Tensor | None
    scale: Tensor | None
    context: KeyValue


@dataclass(frozen=True)
class AudioState:
    """Everything that depends only on a block's audio: tokens [N, F, n + 1, D] and [N, F, 1, D], one entry a layer."""

    local: Tensor
    whole: Tensor
    layers: tuple[Injection, ...]


class AdaLayer(nn.Module):
    """Shift and scale from the global audio token."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> shift [..., D], scale [..., D]."""
        shift, scale = self.linear(F.silu(token)).chunk(2, -1)
        return shift, scale


class AudioInjector(nn.Module):
    """Cross attention from the tokens of each latent frame to the audio tokens of that frame, added without a gate."""

    ADAIN_EPS = 1e-5  # the published AdaLayerNorm's own epsilon; plain norms use the model's

    def __init__(self, dim: int, num_heads: int, layers: int, eps: float, enable_adain: bool, adain_mode: str):
        super().__init__()
        self.injector = nn.ModuleList(CrossAttention(dim, num_heads, eps) for _ in range(layers))
        self.adain = enable_adain and adain_mode == "attn_norm"
        if enable_adain:
            self.injector_adain_layers = nn.ModuleList(AdaLayer(dim) for _ in range(layers))
            if not self.adain:  # present in such checkpoints, unused by the forward pass
                self.injector_adain_output_layers = nn.ModuleList(Linear(dim, dim) for _ in range(layers))
        self.norm_eps = self.ADAIN_EPS if self.adain else eps

    def prepare_layer(self, index: int, local: Tensor, whole: Tensor) -> Injection:
        """Modulation, keys and values of injection layer `index` for audio tokens as in `AudioState`."""
        context = cast(CrossAttention, self.injector[index]).context(local.flatten(0, 1))
        if not self.adain:
            return Injection(None, None, context)
        shift, scale = self.injector_adain_layers[index](whole.flatten(0, 1))
        return Injection(shift, scale, context)

    def prepare(self, local: Tensor, whole: Tensor) -> AudioState:
        """All that the injections need of the audio; the same for every denoising step of a block."""
        layers = tuple(self.prepare_layer(i, local, whole) for i in range(len(self.injector)))
        return AudioState(local, whole, layers)

    def forward(self, index: int, x: Tensor, audio: Injection, frames: int, mask: Tensor | None = None) -> Tensor:
        """x [B, F*P, D] plus the audio residual of each of its `frames`.

        With N = A * B audio entries, A > 1 actors, `mask` [A, F*P] says where each actor's voice goes.
        """
        entries = audio.context.k.shape[0] // frames
        if entries % x.shape[0]:
            raise ValueError(f"{entries} audio entries cannot be shared by a batch of {x.shape[0]}")
        actors = entries // x.shape[0]
        if actors > 1 and mask is None:
            raise ValueError(f"{actors} actors speak but there is no actor mask; pass actor_mask [actors, F, H, W, 1]")
        tokens = (x if actors == 1 else x.repeat_interleave(actors, 0)).float()  # [N, F*P, D]
        if audio.shift is None or audio.scale is None:
            normed = ops.layer_norm(tokens, eps=self.norm_eps)
        else:
            shift, scale = (table.view(entries, frames, -1) for table in (audio.shift, audio.scale))  # a row a frame
            normed = ops.adaln(tokens, shift, scale, eps=self.norm_eps)
        normed = normed.unflatten(1, (frames, -1)).flatten(0, 1)  # [N*F, P, D]
        residual = self.injector[index](normed, audio.context)
        return ops.audio_residual(x, residual.unflatten(0, (entries, frames)).flatten(1, 2), mask)
