"""Audio residual: add the audio branch of every actor to the video tokens, each where its mask lets it.

    y = cast(x + sum_a residual_a * mask_a)

Shapes: x [B, L, D]; residual [B * A, L, D], sample-major; mask [A, L] or None (then A = 1). Result like x.
Dtypes: the product with the mask rounds to the dtype of `residual`, the sum over actors is float32, the final sum
rounds once (liveavatar.md, 2.8). Errors: ValueError when the residual's batch is not A times that of x.
"""

import torch
from torch import Tensor


def reference(x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
    actors = 1 if mask is None else mask.shape[0]
    if residual.shape[0] != actors * x.shape[0]:
        raise ValueError(f"{residual.shape[0]} residuals for {x.shape[0]} samples and {actors} masks")
    if mask is None:
        return (x + residual).to(x.dtype)
    masked = residual.unflatten(0, (-1, actors)) * mask[None, :, :, None].to(residual.dtype)  # [B, A, L, D]
    return (x + masked.sum(1, dtype=torch.float32)).to(x.dtype)


def audio_residual(x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
    """`x + sum of masked residuals`; see the module docstring."""
    return reference(x, residual, mask)


def cases() -> list[dict[str, int]]:
    """LiveAvatar 14B at 704x384: one speaker, two speakers."""
    return [
        {"batch": 1, "actors": 1, "tokens": 3168, "dim": 5120},
        {"batch": 1, "actors": 2, "tokens": 3168, "dim": 5120},
    ]
