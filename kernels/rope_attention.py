"""Softmax attention whose keys come from several segments (rolling cache, condition keys, text), never concatenated
by the caller.

    out = softmax(q K^T / sqrt(d)) V,   K = [k_0 | rope(k_1) | ...],  V = [v_0 | v_1 | ...]

Shapes: q [B, Lq, H, d]; each k_i, v_i [B, L_i, H, d]; `ropes[i]` [L_i', d/2, 2] float32 rotates segment i on load
(None: already rotated); `lengths[i]` (int, or a 0-dim int tensor on the device) says how many leading rows of segment
i are valid (None: all); `mask` [Lq, sum L_i] bool, True = attend (training). Result [B, Lq, H, d] in the dtype of q.
Dtypes: q, rotated k and v meet in the dtype of v; softmax and both products in float32, one rounding of the result.
Errors: ValueError when the segment lists differ in length or no key is given.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import HALF
from .qk_norm_rope import apply_rope


def reference(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None] | None = None,
    lengths: Sequence[int | Tensor | None] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    ropes = ropes or [None] * len(keys)
    lengths = lengths or [None] * len(keys)
    if not keys or not len(keys) == len(values) == len(ropes) == len(lengths):
        raise ValueError(
            f"segments differ: {len(keys)} keys, {len(values)} values, {len(ropes)} ropes, {len(lengths)} lengths"
        )
    dtype = values[0].dtype
    spans = [k.shape[1] if n is None else int(n) for k, n in zip(keys, lengths, strict=True)]
    k = torch.cat([apply_rope(k[:, :n], r, dtype) for k, r, n in zip(keys, ropes, spans, strict=True)], 1)
    v = torch.cat([v[:, :n] for v, n in zip(values, spans, strict=True)], 1)
    inner = torch.float32 if dtype in HALF and q.device.type == "cpu" else dtype
    out = F.scaled_dot_product_attention(
        q.to(dtype).to(inner).transpose(1, 2), k.to(inner).transpose(1, 2), v.to(inner).transpose(1, 2), mask
    )
    return out.transpose(1, 2).to(dtype).to(q.dtype)


def rope_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None] | None = None,
    lengths: Sequence[int | Tensor | None] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention over segmented keys; see the module docstring."""
    return reference(q, keys, values, ropes, lengths, mask)


def cases() -> list[dict[str, int]]:
    """LiveAvatar 14B: 3,168 queries, a ring of 12 latent frames and 2,640 condition keys; text; audio tokens."""
    return [
        {"queries": 3168, "ring": 12672, "cond": 2640, "heads": 40, "head_dim": 128},
        {"queries": 3168, "ring": 512, "cond": 0, "heads": 40, "head_dim": 128},
        {"queries": 1056, "ring": 5, "cond": 0, "heads": 40, "head_dim": 128},
    ]
