"""Query/key preparation: full-width RMS norm, split into heads, rotary embedding.

    q = rope(heads(rms(q, weight_q)));  k likewise

Shapes: q, k [B, L, D]; weights [D]; rope [L', d/2, 2] float32 (cos, sin) with L' <= L, or None for no rotation;
result [B, L, H, d] each. A table [B, L', d/2, 2] rotates every sample by its own. Tokens beyond L' stay unrotated.
Pairs are interleaved: (x[2i], x[2i+1]) = re, im.
Dtypes: the rotation runs in float32 and its result has `out_dtype` (default: the dtype of the normed input).
"""

import torch
from torch import Tensor

from .norm import rms_norm


def apply_rope(x: Tensor, rope: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Rotate the interleaved pairs of x [B, L, H, d] by rope [(B,) L', d/2, 2]; tokens from L' on are left alone."""
    out_dtype = out_dtype or x.dtype
    if rope is None:
        return x.to(out_dtype)
    length = rope.shape[-3]
    if length > x.shape[1]:
        raise ValueError(f"rotary table has {length} rows for {x.shape[1]} tokens")
    cos, sin = rope.unsqueeze(-3).unbind(-1)  # [(B,) L', 1, d/2]
    re, im = x[:, :length].float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, L', H, d/2]
    rotated = torch.stack((re * cos - im * sin, re * sin + im * cos), -1).flatten(-2).to(out_dtype)
    if length == x.shape[1]:
        return rotated
    return torch.cat((rotated, x[:, length:].to(out_dtype)), 1)


def reference(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    heads = (num_heads, -1)
    q = rms_norm(q, weight_q, eps).unflatten(-1, heads)
    k = rms_norm(k, weight_k, eps).unflatten(-1, heads)
    return apply_rope(q, rope, out_dtype), apply_rope(k, rope, out_dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Normed and rotated queries and keys [B, L, H, d]; see the module docstring."""
    return reference(q, k, weight_q, weight_k, rope, num_heads, eps, out_dtype)


def cases() -> list[dict[str, int]]:
    return [{"tokens": 3168, "heads": 40, "head_dim": 128}, {"tokens": 32760, "heads": 12, "head_dim": 128}]
