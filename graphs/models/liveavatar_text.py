"""A prompt's keys and values in e4m3, for streams whose caches are e4m3 in one buffer (`RingFormat`, "joined").

Legend: B samples, L queries of each, T text tokens, H heads, d head size, D = H d.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.attention_joined import attention_joined, joined_scales
from ...kernels.kv_cache import E4M3, rotate_rows_into, static_scales
from .liveavatar import LiveAvatar
from .liveavatar_block import CrossAttention
from .liveavatar_cache import KeyValue


@dataclass(frozen=True)
class Fp8Context:
    """One layer's text keys and values [1, T, H, d] in e4m3 with one scale a tensor; a prompt is padded, not masked.

    `length` int32 [1]: T; `scale_q` float32 [H], equal numbers; `scales` as `joined_scales` makes them.
    """

    k8: Tensor
    v8: Tensor
    length: Tensor
    scale_q: Tensor
    scales: Tensor

    @classmethod
    def of(cls, attention: CrossAttention, kept: KeyValue, rows: int) -> "Fp8Context":
        """From keys and values [1, T, H, d] of `attention.context`, for at most `rows` queries of all samples together.

        Scales of queries and keys follow from their norms' weights, that of values from the largest; ValueError for
        several prompts.
        """
        batch, length, heads, _ = kept.k.shape
        if batch != 1:
            raise ValueError(f"{batch} prompts; text in e4m3 is one prompt that all samples share")
        scale_q, scale_k = (static_scales(norm.weight, 1) for norm in (attention.norm_q, attention.norm_k))
        largest = torch.linalg.vector_norm(kept.v, float("inf")).float()
        scale_v = torch.where(largest > 0, 448.0 / largest.clamp(min=1e-12), 1.0)
        return cls(
            _rounded(kept.k, scale_k),
            _rounded(kept.v, scale_v),
            torch.full((1,), length, dtype=torch.int32, device=kept.k.device),
            scale_q.expand(heads).contiguous(),
            # a result is a weighted mean of values, no larger than they are
            joined_scales(scale_q, scale_k, scale_v, scale_v, rows),
        )

    def attend(self, q: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `Context.attend`: all samples see the same keys, so their queries are those of one."""
        q8 = ops.head_norm_fp8(q.flatten(0, 1)[None], weight, self.scale_q, self.k8.shape[2], eps)  # [1, B L, H, d]
        return attention_joined(q8, self.k8, self.v8, self.length, self.scales).view(q.shape)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x [1, T, H, d] times one number, in e4m3."""
    out = torch.empty(x.shape, dtype=E4M3, device=x.device)
    rotate_rows_into(x, None, out, scale.expand(x.shape[2]).contiguous())
    return out


@dataclass(frozen=True)
class Fp8TextState:
    """A prompt as `TextState` has it, in e4m3."""

    layers: tuple[Fp8Context, ...]


def embed_text_fp8(dit: LiveAvatar, context: Tensor, rows: int) -> Fp8TextState:
    """`LiveAvatar.embed_text` of one prompt [n, text_dim] in e4m3, layer by layer, so that no wider copy of all layers
    is held; `rows` as in `Fp8Context.of`."""
    attentions = [block.cross_attn for block in dit.layers]
    tokens = dit.text_tokens(context)
    return Fp8TextState(tuple(Fp8Context.of(layer, layer.context(tokens), rows) for layer in attentions))
