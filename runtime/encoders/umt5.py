"""UMT5-XXL text encoder, through `transformers.UMT5EncoderModel`, from the published `.pth` layout (wan.md 2.2)."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from ...checkpoints_tools.keymaps import UMT5
from ...checkpoints_tools.load import load_module
from .half_precision import rounded_once
from .loading import open_checkpoint

FP16_HEADROOM = 1000.0


@dataclass(frozen=True)
class Umt5Size:
    """Sizes of the encoder; every layer has its own table of position biases."""

    vocab: int
    dim: int
    heads: int
    head_dim: int
    ffn: int
    layers: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def to_transformers(self) -> UMT5Config:
        """The same sizes as a transformers configuration."""
        return UMT5Config(
            vocab_size=self.vocab,
            d_model=self.dim,
            d_kv=self.head_dim,
            d_ff=self.ffn,
            num_layers=self.layers,
            num_heads=self.heads,
            relative_attention_num_buckets=self.buckets,
            relative_attention_max_distance=self.max_distance,
            layer_norm_epsilon=self.eps,
            feed_forward_proj="gated-gelu",
        )


UMT5_XXL = Umt5Size(vocab=256384, dim=4096, heads=64, head_dim=64, ffn=10240, layers=24)


def relative_buckets(relative: Tensor, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Bucket of each relative position (key index - query index), any shape, int64 (wan.md 2.2).

    Half of the buckets are for positive positions. In each half the small distances have a bucket each, the others
    share logarithmic ones up to `max_distance` (float32 logarithm, truncated).
    """
    half = buckets // 2
    exact = half // 2
    distance = relative.abs()
    ratio = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = exact + ratio.clamp(min=0.0).long()  # log(0) never reaches the integer cast
    bucket = torch.where(distance < exact, distance, far.clamp(max=half - 1))
    return bucket + half * (relative > 0).long()


def clamp_overflow(x: Tensor) -> Tensor:
    """float16 only: if any value is infinite, clamp the whole tensor to +-64504 (64512 in float16); else x itself.

    Stays on the device (no host synchronisation). bfloat16 and float32 are never clamped (wan.md 2.2, quirk 22).
    """
    if x.dtype != torch.float16:
        return x
    top = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), top - FP16_HEADROOM, top).to(x.dtype)
    return torch.clamp(x, -limit, limit)


def _clamp_hook(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return clamp_overflow(output[0]), *output[1:]
    return clamp_overflow(output)


class Umt5Encoder(nn.Module):
    """Token ids and mask -> hidden states. The weights lie where they are made or loaded; eval mode, no gradients."""

    def __init__(self, size: Umt5Size = UMT5_XXL):
        super().__init__()
        self.size = size
        self.model = UMT5EncoderModel(size.to_transformers()).eval().requires_grad_(False)
        self.model.encoder.set_attn_implementation("eager")  # logits, position bias and mask round one after the other
        self.model.encoder.embed_tokens = self.model.shared
        for block in self.model.encoder.block:
            for part in (block.layer[0], block.layer[-1]):  # their results are the two residual sums
                part.register_forward_hook(_clamp_hook)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        size: Umt5Size = UMT5_XXL,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> "Umt5Encoder":
        """From `models_t5_umt5-xxl-enc-bf16.pth` (mapped, not copied, when dtype and device allow).

        Raises CheckpointError that names the file and every missing, unexpected or mis-shaped key.
        """
        with torch.device("meta"):
            encoder = cls(size)
        with open_checkpoint(checkpoint) as weights:
            load_module(encoder.model, weights, UMT5, dtype=dtype, device=device)
        return encoder

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [B, L], mask [B, L] (1 = real token; None = all) -> [B, L, D] in the dtype of the weights.

        Rows of padded positions are numbers without meaning; see `trim` and `zero_padding`.
        """
        if mask is None:
            mask = torch.ones_like(ids)
        with rounded_once():
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def zero_padding(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, L, D] with the rows of padded positions set to zero."""
    return hidden.masked_fill(mask[..., None] == 0, 0.0)


def trim(hidden: Tensor, mask: Tensor) -> list[Tensor]:
    """[B, L, D] -> per text [n, D], the real tokens alone (padding stands at the end)."""
    return [rows[:count] for rows, count in zip(hidden, mask.gt(0).sum(1).tolist(), strict=True)]
