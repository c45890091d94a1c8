"""Adaptive layer norm: LayerNorm without affine, then a shift and scale chosen per token row.

    n = cast(LN(x));  y = n * (1 + scale[row]) + shift[row]

Shapes: x [B, L, D]; shift, scale [B, R, D]; `rows` [L] int gives the modulation row of each token, or None:
then R divides L and each row serves L / R consecutive tokens (frames, or the whole sequence with R = 1).
Dtypes: statistics in float32, the normalised value is cast to the dtype of x, the rest follows torch's
promotion, so the dtype of shift and scale decides where the result rounds (wan.md, 2.3.5).
Errors: ValueError when R does not divide L, or `rows` has not L entries.
"""

import torch
from torch import Tensor

from .norm import layer_norm


def expand_rows(table: Tensor, length: int, rows: Tensor | None) -> Tensor:
    """Modulation rows [B, R, D] -> one per token [B, L, D] (R = 1 stays [B, 1, D] and broadcasts)."""
    if rows is not None:
        if rows.shape != (length,):
            raise ValueError(f"rows has shape {tuple(rows.shape)}; one entry per token is needed: ({length},)")
        return table[:, rows]
    count = table.shape[1]
    if count == 1 or count == length:
        return table
    if length % count:
        raise ValueError(f"{count} modulation rows do not divide {length} tokens; pass `rows`")
    return table.repeat_interleave(length // count, dim=1)


def reference(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    length = x.shape[1]
    normed = layer_norm(x, eps=eps)
    return normed * (1 + expand_rows(scale, length, rows)) + expand_rows(shift, length, rows)


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Modulated layer norm; see the module docstring. `out_dtype` casts the result once, at the end."""
    y = reference(x, shift, scale, rows, eps)
    return y if out_dtype is None else y.to(out_dtype)


def cases() -> list[dict[str, int]]:
    """Real shapes: one streaming block of LiveAvatar 14B, one bidirectional pass of Wan 1.3B."""
    return [
        {"batch": 1, "tokens": 3168, "rows": 3, "dim": 5120},
        {"batch": 1, "tokens": 32760, "rows": 1, "dim": 1536},
    ]
