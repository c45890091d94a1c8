"""Transformer block and head of LiveAvatar (liveavatar.md, 2.5, 2.6, 2.9).

The residual stream enters and leaves a block in the flow's dtype and is float32 in between.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...kernels import ops
from .layers import LayerNorm, Linear, RmsNorm, mlp
from .liveavatar_cache import Context, KeyValue, Memory, Projected


class Attention(nn.Module):
    """Projections with full-width RMS norm on queries and keys."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q = RmsNorm(dim, eps)
        self.norm_k = RmsNorm(dim, eps)
        self.num_heads = num_heads
        self.eps = eps

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # [B, L, H, d]


class CrossAttention(Attention):
    """Attention to text or audio tokens, whose keys and values are prepared once by `context`."""

    def context(self, tokens: Tensor) -> KeyValue:
        """Keys and values [B, L, H, d] of context tokens [B, L, D]."""
        return KeyValue(self.heads(self.norm_k(self.k(tokens))), self.heads(self.v(tokens)))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D]; a context of batch 1 is shared by all samples."""
        return self.o(context.attend(self.q(x), self.norm_q.weight, self.eps))


class ClipRope(NamedTuple):
    """Rotary tables [(B,) tokens, d/2, 2] of a training clip: noisy tokens, and condition tokens as the noisy ones and
    as they themselves see them (the reference moves only for the former)."""

    noisy: Tensor
    condition: Tensor
    prefill: Tensor


class SelfAttention(Attention):
    """The three uses of one attention layer: a whole sequence, the condition prefill, and a block of a stream."""

    def _project(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        v = self.heads(self.v(x))
        weights = self.norm_q.weight, self.norm_k.weight
        q, k = ops.qk_norm_rope(self.q(x), self.k(x), *weights, rope, self.num_heads, self.eps, v.dtype)
        return q, k, v

    def forward(self, x: Tensor, rope: ClipRope, mask: Tensor) -> Tensor:
        """Training: N noisy, then C condition tokens [B, N + C, D]; `mask` [N, N + C] for the noisy queries.

        Condition tokens see each other where the prefill puts them, noisy tokens see them where the stream does.
        """
        noisy, still = mask.shape[0], slice(mask.shape[0], None)
        q, k, v = self._project(x, None)
        keys = [ops.apply_rope(k[:, :noisy], rope.noisy), k[:, still]]
        y = ops.rope_attention(
            ops.apply_rope(q[:, :noisy], rope.noisy),
            keys,
            [v[:, :noisy], v[:, still]],
            ropes=[None, rope.condition],
            mask=mask,
        )
        queries = ops.apply_rope(q[:, still], rope.prefill)
        y_still = ops.rope_attention(queries, [k[:, still]], [v[:, still]], ropes=[rope.prefill])
        return self.o(torch.cat((y, y_still), 1).flatten(2))

    def prefill(self, x: Tensor, rope: Tensor, store: Callable[[KeyValue], None]) -> Tensor:
        """Condition tokens among themselves; `store` receives their keys before rotation, and their values."""
        q, k, v = self._project(x, None)
        store(KeyValue(k, v))
        return self.o(ops.rope_attention(ops.rotate_rows(q, rope), [k], [v], ropes=[rope]).flatten(2))

    def stream(self, x: Tensor, rope: Tensor, memory: Memory) -> Tensor:
        """One block of a stream: its keys and values go into the memory, its queries attend all that is there."""
        weights = self.norm_q.weight, self.norm_k.weight
        projected = Projected(self.q(x), self.k(x), self.v(x), *weights, self.num_heads, self.eps)
        return self.o(memory.attend(projected, rope).flatten(2))


class Modulation(NamedTuple):
    """Six float32 vectors [B, R, D] a row (a latent frame, or the condition tokens)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class Block(nn.Module):
    """Modulated self attention, text cross attention, modulated feed-forward."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float):
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.ffn = mlp(dim, ffn_dim, dim, nn.GELU(approximate="tanh"))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.eps = eps

    def modulate(self, e0: Tensor) -> Modulation:
        """Time rows [B, R, 6, D] -> the block's six vectors [B, R, D]."""
        return Modulation(*(self.modulation[:, None] + e0).unbind(2))

    def forward(
        self,
        x: Tensor,
        e0: Tensor,
        text: Context,
        attend: Callable[[Tensor], Tensor],
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, D] -> [B, L, D]; `attend` is one use of `self_attn`, `rows` [L] the modulation row of each token."""
        dtype = x.dtype
        m = self.modulate(e0)
        y = attend(ops.adaln(x, m.shift1, m.scale1, rows, self.eps, out_dtype=dtype))
        x = ops.gated_residual(x, y, m.gate1, rows)  # float32 from here to the end of the block
        x = x + self.cross_attn(self.norm3(x.to(dtype)), text)
        y = self.ffn(ops.adaln(x, m.shift2, m.scale2, rows, self.eps, out_dtype=dtype))
        return ops.gated_residual(x, y, m.gate2, rows).to(dtype)


class Head(nn.Module):
    """Modulated projection of the noisy tokens to patches of the flow; float32 inside."""

    def __init__(self, dim: int, patch_values: int, eps: float):
        super().__init__()
        self.head = Linear(dim, patch_values, island=True)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.eps = eps

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, L, D], e [B, R, D] -> [B, L, pt*ph*pw*C] in the dtype of x."""
        shift, scale = (self.modulation[:, None] + e[:, :, None]).unbind(2)
        return self.head(ops.adaln(x, shift, scale, eps=self.eps)).to(x.dtype)


def block_mask(
    blocks: int,
    block_tokens: int,
    condition: int,
    history_blocks: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Training mask [N + C, N + C], N = blocks * block_tokens, C = `condition`, True = attend (2.11).

    Noisy tokens see their own and earlier blocks (at most `history_blocks` earlier ones) and all condition tokens;
    condition tokens see condition tokens.
    """
    block = torch.arange(blocks, device=device).repeat_interleave(block_tokens)
    age = block[:, None] - block
    seen = age >= 0
    if history_blocks is not None:
        seen &= age <= history_blocks
    noisy = len(block)
    mask = torch.zeros(noisy + condition, noisy + condition, dtype=torch.bool, device=device)
    mask[:noisy, :noisy] = seen
    mask[:, noisy:] = True
    return mask
