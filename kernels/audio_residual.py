"""Audio residual: add the audio branch of every actor to the video tokens, each where its mask lets it.

    y = cast(x + sum_a residual_a * mask_a)

Shapes: x [B, L, D]; residual [B * A, L, D], sample-major; mask [A, L] or None (then A = 1). Result like x.
Dtypes: the product with the mask rounds to the dtype of `residual`, the sum over actors is float32, the final sum
rounds once (liveavatar.md, 2.8). NaN and infinity stay in their element (a mask of zero does not hide them).
Errors: ValueError when the residual's batch is not A times that of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import Case, Op, randn
from .dispatch import autograd_by_reference, fused, triton_runs
from .launch import launched
from .rows import rounded, row_major, store_piece, stream_piece, tile, triton_dtype


def reference(x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
    actors = check(x, residual, mask)
    if mask is None:
        return (x + residual).to(x.dtype)
    masked = residual.unflatten(0, (-1, actors)) * mask[None, :, :, None].to(residual.dtype)  # [B, A, L, D]
    return (x + masked.sum(1, dtype=torch.float32)).to(x.dtype)


def check(x: Tensor, residual: Tensor, mask: Tensor | None) -> int:
    """The number of actors."""
    actors = 1 if mask is None else mask.shape[0]
    if residual.shape[0] != actors * x.shape[0]:
        raise ValueError(f"{residual.shape[0]} residuals for {x.shape[0]} samples and {actors} masks")
    return actors


@triton.jit
def _sum(
    x,  # [B, L, D]
    residual,  # [B * A, L, D]
    mask,  # [A, L] or None: 1
    out,  # [B, L, D]
    length,
    x_batch,
    x_token,
    residual_batch,
    residual_token,
    ACTORS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    batch = index // length
    token = index % length
    x += batch * x_batch + token * x_token
    residual += batch * ACTORS * residual_batch + token * residual_token
    for i in tl.static_range(PIECES):
        total = tl.zeros([BLOCK], tl.float32)
        for actor in tl.static_range(ACTORS):
            part = stream_piece(residual + actor * residual_batch, i, DIM, BLOCK)
            if mask is not None:
                weight = rounded(tl.load(mask + actor * length + token).to(tl.float32), RESIDUAL)
                part = rounded(part * weight, RESIDUAL)
            total += part
        store_piece(out + index * DIM, stream_piece(x, i, DIM, BLOCK) + total, i, DIM, BLOCK)


@torch.library.custom_op("kinora::audio_residual", mutates_args=())
def _audio_residual(x: Tensor, residual: Tensor, mask: Tensor | None) -> Tensor:
    if not triton_runs(x, residual, mask):
        return reference(x, residual, mask).contiguous()
    batch, length, dim = x.shape
    x, residual = row_major(x), row_major(residual)
    out = x.new_empty(x.shape)
    tiling = tile(dim)
    if batch * length:
        launched(_sum)[(batch * length,)](
            x,
            residual,
            None if mask is None else mask.contiguous(),
            out,
            length,
            *x.stride()[:2],
            *residual.stride()[:2],
            ACTORS=1 if mask is None else mask.shape[0],
            RESIDUAL=triton_dtype(residual.dtype),
            DIM=dim,
            PIECES=tiling.pieces(dim),
            BLOCK=tiling.block,
            num_warps=tiling.num_warps,
        )
    return out


@_audio_residual.register_fake
def _(x: Tensor, residual: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


autograd_by_reference(_audio_residual, reference)


def audio_residual(x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
    """`x + sum of masked residuals`; see the module docstring."""
    if not fused(x, residual, mask):
        return reference(x, residual, mask)
    check(x, residual, mask)
    if residual.shape[1:] != x.shape[1:] or (mask is not None and mask.shape[1:] != x.shape[1:2]):
        mask_shape = None if mask is None else tuple(mask.shape)
        raise ValueError(f"residual {tuple(residual.shape)} and mask {mask_shape} do not fit x {tuple(x.shape)}")
    return _audio_residual(x, residual, mask)


def _case(name: str, batch: int, actors: int, tokens: int, dim: int, small: bool = False) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        x = randn(batch, tokens, dim, device=device, generator=generator, dtype=torch.bfloat16)
        residual = randn(batch * actors, tokens, dim, device=device, generator=generator, dtype=torch.bfloat16)
        if actors == 1:
            return {"x": x, "residual": residual}
        return {"x": x, "residual": residual, "mask": torch.rand(actors, tokens, generator=generator).to(device)}

    values = batch * tokens * dim
    cost = values * 2 * (actors + 2) + (actors * tokens * 4 if actors > 1 else 0)
    return Case(name, inputs, 0 if small else values * (2 * actors - 1), 0 if small else cost, small)


def cases() -> list[Case]:
    """LiveAvatar 14B at 704x384: one speaker, two speakers; awkward ones."""
    return [
        _case("one speaker", 1, 1, 3168, 5120),
        _case("two speakers", 1, 2, 3168, 5120),
        _case("three speakers, tail", 2, 3, 5, 300, small=True),
        _case("one token", 1, 1, 1, 20, small=True),
    ]


OP = Op("audio_residual", audio_residual, reference, cases)
