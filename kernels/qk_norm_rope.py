"""Query/key preparation: full-width RMS norm, split into heads, rotary embedding.

    q = rope(heads(rms(q, weight_q)));  k likewise

`qk_norm_rope` returns both, `head_norm` one of them (cross-attention queries: no rotation), `rotate_rows` only rotates.
The streaming form, which writes keys and values into a ring, is `kv_cache.qkv_norm_rope`.

Shapes: q, k [B, L, D]; weights [D]; rope [L', d/2, 2] float32 (cos, sin) with L' <= L, or None for no rotation;
result [B, L, H, d] each. A table [B, L', d/2, 2] rotates every sample by its own. Tokens beyond L' stay unrotated.
Pairs are interleaved: (x[2i], x[2i+1]) = re, im.
Dtypes: statistics in float32; rounds to the dtype of the input before the weight, to their promoted dtype after it; the
rotation runs in float32 and its result has `out_dtype` (default: the dtype of the normed input).
Non-finite values: a NaN or Inf makes its own token NaN, and no other.
Errors: ValueError when D does not split into `num_heads`, a weight is not [D], or the table does not fit.
Source: Wan 2.1 (specification wan.md, 2.3.5); RoFormer (Su et al., 2021).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Op, randn
from .dispatch import autograd_by_reference, fused, triton_runs
from .norm import rms_norm
from .qk_rows import HEAD_DIMS, Part, prepare_rows


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
    return (
        head_norm_reference(q, weight_q, rope, num_heads, eps, out_dtype),
        head_norm_reference(k, weight_k, rope, num_heads, eps, out_dtype),
    )


def head_norm_reference(
    x: Tensor,
    weight: Tensor,
    rope: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return apply_rope(rms_norm(x, weight, eps).unflatten(-1, (num_heads, -1)), rope, out_dtype)


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
    check_projection(q, (weight_q,), rope, num_heads)
    check_projection(k, (weight_k,), rope, num_heads)
    if not _registered(q, k, weight_q, weight_k, rope, num_heads):
        return reference(q, k, weight_q, weight_k, rope, num_heads, eps, out_dtype)
    return torch.ops.kinora.qk_norm_rope(q, k, weight_q, weight_k, rope, num_heads, eps, out_dtype)


def head_norm(
    x: Tensor,
    weight: Tensor,
    num_heads: int,
    rope: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One tensor [B, L, D], normed, split into heads and, with a table, rotated: [B, L, H, d]."""
    check_projection(x, (weight,), rope, num_heads)
    if not _registered(x, x, weight, weight, rope, num_heads):
        return head_norm_reference(x, weight, rope, num_heads, eps, out_dtype)
    return torch.ops.kinora.head_norm(x, weight, rope, num_heads, eps, out_dtype)


def rotate_rows(x: Tensor, rope: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """`apply_rope` as an op: x [B, L, H, d] rotated by rope [(B,) L', d/2, 2], once for all that will read it."""
    check_table(rope, x.shape)
    if not fused(x, rope) or x.shape[-1] not in HEAD_DIMS:
        return apply_rope(x, rope, out_dtype)
    return torch.ops.kinora.rotate_rows(x, rope, out_dtype, False)


def check_projection(x: Tensor, weights: Sequence[Tensor], rope: Tensor | None, num_heads: int) -> None:
    """Raise ValueError unless x [B, L, D] splits into heads and weights [D] and the table fit it."""
    if x.dim() != 3 or x.shape[-1] % num_heads:
        raise ValueError(f"a projection has shape {tuple(x.shape)}; it must be [B, L, D] with D in {num_heads} heads")
    for weight in weights:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"a norm weight has shape {tuple(weight.shape)}; it must be [{x.shape[-1]}]")
    if rope is not None:
        check_table(rope, (*x.shape[:2], num_heads, x.shape[-1] // num_heads))


def check_table(rope: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless `rope` can turn a tensor of this shape [B, L, H, d]."""
    batch, tokens, _, head_dim = shape
    if rope.dim() not in (3, 4) or rope.shape[-2:] != (head_dim // 2, 2):
        raise ValueError(
            f"rotary table has shape {tuple(rope.shape)}; it must be [L, {head_dim // 2}, 2] or "
            f"[B, L, {head_dim // 2}, 2]"
        )
    if rope.shape[-3] > tokens:
        raise ValueError(f"rotary table has {rope.shape[-3]} rows for {tokens} tokens")
    if rope.dim() == 4 and rope.shape[0] not in (1, batch):
        raise ValueError(f"rotary table holds {rope.shape[0]} samples for a batch of {batch}")


def _registered(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor | None, num_heads: int) -> bool:
    """Whether the registered op serves this call; the kernel knows head sizes that are powers of two."""
    known = q.shape[-1] // num_heads in HEAD_DIMS and q.dtype != torch.float64
    return known and q.shape[:2] == k.shape[:2] and fused(q, k, weight_q, weight_k, rope)


def _out_dtype(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    return out_dtype or torch.promote_types(x.dtype, weight.dtype)


def _empty_heads(x: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    batch, tokens, dim = x.shape
    return x.new_empty((batch, tokens, num_heads, dim // num_heads), dtype=dtype)


@torch.library.custom_op("kinora::qk_norm_rope", mutates_args=())
def _qk_norm_rope_op(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if not triton_runs(q, k, weight_q, weight_k, rope):
        return reference(q, k, weight_q, weight_k, rope, num_heads, eps, out_dtype)
    out_q = _empty_heads(q, num_heads, _out_dtype(q, weight_q, out_dtype))
    out_k = _empty_heads(k, num_heads, _out_dtype(k, weight_k, out_dtype))
    parts = [Part(q, out_q, weight_q, rotate=True), Part(k, out_k, weight_k, rotate=True)]
    prepare_rows(parts, num_heads, rope, eps)
    return out_q, out_k


@_qk_norm_rope_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return (
        _empty_heads(q, num_heads, _out_dtype(q, weight_q, out_dtype)),
        _empty_heads(k, num_heads, _out_dtype(k, weight_k, out_dtype)),
    )


@torch.library.custom_op("kinora::head_norm", mutates_args=())
def _head_norm_op(
    x: Tensor, weight: Tensor, rope: Tensor | None, num_heads: int, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    if not triton_runs(x, weight, rope):
        return head_norm_reference(x, weight, rope, num_heads, eps, out_dtype).clone()
    out = _empty_heads(x, num_heads, _out_dtype(x, weight, out_dtype))
    prepare_rows([Part(x, out, weight, rotate=True)], num_heads, rope, eps)
    return out


@_head_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor, rope: Tensor | None, num_heads: int, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    return _empty_heads(x, num_heads, _out_dtype(x, weight, out_dtype))


@torch.library.custom_op("kinora::rotate_rows", mutates_args=())
def _rotate_rows_op(x: Tensor, rope: Tensor, out_dtype: torch.dtype | None, inverse: bool) -> Tensor:
    """`inverse` applies the transpose of the rotation, which is its gradient."""
    if not triton_runs(x, rope):
        return apply_rope(x, rope * rope.new_tensor([1.0, -1.0]) if inverse else rope, out_dtype).clone()
    out = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    prepare_rows([Part(x, out, rotate=True)], x.shape[2], rope, inverse=inverse)
    return out


@_rotate_rows_op.register_fake
def _(x: Tensor, rope: Tensor, out_dtype: torch.dtype | None, inverse: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rope, _, inverse = inputs
    ctx.save_for_backward(rope)
    ctx.dtype, ctx.inverse = x.dtype, inverse


def _rotate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (rope,) = ctx.saved_tensors
    return torch.ops.kinora.rotate_rows(grad, rope, ctx.dtype, not ctx.inverse), None, None, None


autograd_by_reference(_qk_norm_rope_op, reference)
autograd_by_reference(_head_norm_op, head_norm_reference)
_rotate_rows_op.register_autograd(_rotate_backward, setup_context=_rotate_setup)


def _case(
    name: str,
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    batch: int = 1,
    rotated: int | None = None,
    dtype: torch.dtype = torch.float32,
    fused_projection: bool = False,
    small: bool = True,
) -> Case:
    """A call with a table of `rotated` rows (None: no table); `fused_projection`: q and k are slices of one qkv."""
    dim = heads * head_dim

    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return randn(*shape, device=device, generator=generator, dtype=dtype)

        q, k = draw(batch, tokens, 3 * dim).chunk(3, -1)[:2] if fused_projection else draw(2, batch, tokens, dim)
        angle = None if rotated is None else draw(rotated, head_dim // 2, dtype=torch.float32)
        return {
            "q": q,
            "k": k,
            "weight_q": draw(dim),
            "weight_k": draw(dim),
            "rope": None if angle is None else torch.stack((angle.cos(), angle.sin()), -1),
            "num_heads": heads,
        }

    size = torch.empty(0, dtype=dtype).element_size()
    moved = 0 if small else batch * tokens * dim * 4 * size + (rotated or 0) * head_dim * 4
    return Case(name, inputs, flops=0, bytes=moved, small=small, tolerance=1e-2 if dtype != torch.float32 else 1e-5)


def cases() -> list[Case]:
    """A streaming block of LiveAvatar 14B, a pass of Wan 1.3B, and awkward sizes."""
    bf16 = torch.bfloat16
    return [
        _case("liveavatar-14b", 3168, 40, 128, rotated=3168, dtype=bf16, fused_projection=True, small=False),
        _case("wan-1.3b", 32760, 12, 128, rotated=32760, dtype=bf16, small=False),
        _case("slices of a projection, padded tokens", 7, 3, 32, batch=2, rotated=5, fused_projection=True),
        _case("one token", 1, 5, 64, rotated=1),
        _case("no rotation, half precision", 6, 2, 128, dtype=bf16),
    ]


OP = Op("qk_norm_rope", qk_norm_rope, reference, cases)
