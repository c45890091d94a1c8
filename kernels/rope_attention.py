"""Softmax attention whose keys come from several segments (rolling cache, condition keys, text), never concatenated
by the caller.

    out = softmax(q K^T / sqrt(d)) V,   K = [k_0 | rope(k_1) | ...],  V = [v_0 | v_1 | ...]

Shapes: q [B, Lq, H, d]; each k_i, v_i [B, L_i, H, d]; `ropes[i]` [(B,) L_i', d/2, 2] float32 rotates the leading rows
of segment i (None: already rotated); `lengths[i]` (int, or an integer tensor of one element on the device) says how
many leading rows of segment i are valid (None: all, 0: none); `mask` [Lq, sum L_i] bool, True = attend (training).
Result [B, Lq, H, d] in the dtype of q.
Dtypes: q, rotated k and v meet in the dtype of v; softmax and both products in float32, one rounding of the result.
On a Hopper GPU a kernel in Gluon serves half precision with d = 128, without masks and tables (`attention_hopper`).
Rotation: a segment that few queries read is rotated as it is loaded; else once, into a buffer (`rotate_rows`).
Non-finite values: a NaN in a query stays in its row, one in a valid key or value spreads to every query of its head
(a masked value too: 0 * NaN); rows beyond `lengths` have no effect, whatever they hold. A query without keys gives
zero (the reference: NaN where a mask hides all keys).
Errors: ValueError when the segment lists differ in length, no key is given, or shapes do not fit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_backward, attention_hopper, attention_table
from .attention_forward import forward
from .cases import Case, Op, randn
from .dispatch import fused, triton_runs
from .linear import HALF
from .qk_norm_rope import apply_rope, check_table, rotate_rows
from .qk_rows import HEAD_DIMS

ROTATE_ON_LOAD = 128
"""Up to so many queries are one query tile, and each key is then rotated once on load as well."""


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
    _check_segments(keys, values, ropes, lengths)
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
    ropes = list(ropes or [None] * len(keys))
    lengths = list(lengths or [None] * len(keys))
    _check_segments(keys, values, ropes, lengths)
    if not fused(q, *keys, *values, mask) or q.shape[3] not in HEAD_DIMS or values[0].dtype == torch.float64:
        return reference(q, keys, values, ropes, lengths, mask)
    _check_shapes(q, keys, values, ropes)
    if mask is not None:
        _check_mask(mask, q, keys, lengths)
    counts = [n if isinstance(n, int) else None for n in lengths]
    keys = [k if n is None else k[:, :n] for k, n in zip(keys, counts, strict=True)]
    values = [v if n is None else v[:, :n] for v, n in zip(values, counts, strict=True)]
    on_device = [n if isinstance(n, Tensor) else None for n in lengths]
    if q.shape[1] > ROTATE_ON_LOAD:
        dtype = values[0].dtype
        keys = [k if r is None else rotate_rows(k, r, dtype) for k, r in zip(keys, ropes, strict=True)]
        ropes = [None] * len(keys)
    return torch.ops.kinora.rope_attention(q, keys, values, ropes, on_device, mask)[0]


def _check_segments(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[int | Tensor | None],
) -> None:
    if not keys or not len(keys) == len(values) == len(ropes) == len(lengths):
        raise ValueError(
            f"segments differ: {len(keys)} keys, {len(values)} values, {len(ropes)} ropes, {len(lengths)} lengths"
        )


def _check_shapes(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], ropes: Sequence[Tensor | None]) -> None:
    batch, _, heads, head_dim = q.shape
    for i, (k, v, rope) in enumerate(zip(keys, values, ropes, strict=True)):
        if k.shape != v.shape or k.shape != (batch, k.shape[1], heads, head_dim):
            raise ValueError(
                f"segment {i} has keys {tuple(k.shape)} and values {tuple(v.shape)}; queries {tuple(q.shape)} need "
                f"[{batch}, L, {heads}, {head_dim}] of both"
            )
        if v.dtype != values[0].dtype:
            raise ValueError(f"segment {i} has {v.dtype} values, segment 0 {values[0].dtype}; give all one dtype")
        if rope is not None:
            check_table(rope, k.shape)


def _check_mask(mask: Tensor, q: Tensor, keys: Sequence[Tensor], lengths: Sequence[int | Tensor | None]) -> None:
    if any(isinstance(n, Tensor) for n in lengths):
        raise ValueError("a mask and a length on the device exclude each other; put the length into the mask")
    width = sum(k.shape[1] if n is None else int(n) for k, n in zip(keys, lengths, strict=True))
    if mask.dtype != torch.bool or mask.shape != (q.shape[1], width):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; it must be bool [{q.shape[1]}, {width}] (True = attend)"
        )


def log_sum_exp(
    q: Tensor,
    keys: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Natural log-sum-exp of every query's scores, float32 [B, H, Lq]; -inf without keys. `dtype`: of the values."""
    spans = [k.shape[1] if n is None else int(n) for k, n in zip(keys, lengths, strict=True)]
    k = torch.cat([apply_rope(k[:, :n], r, dtype) for k, r, n in zip(keys, ropes, spans, strict=True)], 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype).float(), k.float()) * q.shape[3] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).logsumexp(-1)


@torch.library.custom_op("kinora::rope_attention", mutates_args=())
def _rope_attention_op(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp that its backward pass and partial attention need, float32 [B, H, Lq]."""
    if not triton_runs(q, *keys, *values, mask):
        out = reference(q, keys, values, ropes, lengths, mask)
        return out.contiguous(), log_sum_exp(q, keys, ropes, lengths, mask, values[0].dtype)
    library = attention_table.library_for(q, keys, values, ropes, lengths, mask)
    if library:
        return library(q, keys[0], values[0])
    if attention_hopper.serves_half(q, keys, values, ropes, mask):
        return attention_hopper.forward_half(q, keys, values, lengths)
    return forward(q, keys, values, ropes, lengths, mask)


@_rope_attention_op.register_fake
def _(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


@torch.library.custom_op("kinora::rope_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> list[Tensor]:
    """Gradients of q, of all keys, of all values, in this order; each like its tensor."""
    count = len(keys)
    if not triton_runs(q, *keys, *values, mask):
        leaves = (q, *keys, *values)

        def run(*moved: Tensor) -> Tensor:
            return reference(moved[0], moved[1 : 1 + count], moved[1 + count :], ropes, lengths, mask)

        pull = torch.func.vjp(run, *leaves)[1]
        # new tensors: those of several segments are slices of one, and results of an op must not share memory
        return [g.clone(memory_format=torch.contiguous_format) for g in pull(grad)]
    dtype = values[0].dtype
    turned = [k if r is None else rotate_rows(k, r, dtype) for k, r in zip(keys, ropes, strict=True)]
    grads = attention_backward.backward(grad, q, turned, values, lengths, mask, out, lse)
    for i, rope in enumerate(ropes):
        if rope is not None:
            grads[1 + i] = torch.ops.kinora.rotate_rows(grads[1 + i], rope, keys[i].dtype, True)
    return [g.to(t.dtype) for g, t in zip(grads, (q, *keys, *values), strict=True)]


@_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, *keys, *values)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, values, ropes, lengths, mask = inputs
    ctx.segments = len(keys)
    ctx.save_for_backward(q, *keys, *values, *ropes, *lengths, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, *rest = ctx.saved_tensors
    n = ctx.segments
    keys, values, ropes, lengths = (rest[i * n : (i + 1) * n] for i in range(4))
    mask, out, lse = rest[4 * n :]
    grads = torch.ops.kinora.rope_attention_backward(grad, q, keys, values, ropes, lengths, mask, out, lse)
    # PyTorch wants a list of None for a list of tensors, one None for any other list
    none = [[None] * n if all(isinstance(t, Tensor) for t in part) else None for part in (ropes, lengths)]
    return grads[0], grads[1 : 1 + n], grads[1 + n :], *none, None


_rope_attention_op.register_autograd(_backward, setup_context=_setup)


def _case(
    name: str,
    queries: int,
    keys: list[int],
    heads: int,
    head_dim: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    rotated: int | None = None,
    lengths: list[int | None] | None = None,
    masked: bool = False,
    small: bool = True,
) -> Case:
    """`rotated`: rows of the last segment's table; `lengths`: valid rows, on the device."""

    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def draw(rows: int) -> Tensor:
            return randn(batch, rows, heads, head_dim, device=device, generator=generator, dtype=dtype)

        angle = randn(rotated or 0, head_dim // 2, device=device, generator=generator)
        table = None if rotated is None else torch.stack((angle.cos(), angle.sin()), -1)
        counts = lengths or [None] * len(keys)
        mask = randn(queries, sum(keys), device=device, generator=generator) > -0.5 if masked else None
        return {
            "q": draw(queries),
            "keys": [draw(rows) for rows in keys],
            "values": [draw(rows) for rows in keys],
            "ropes": [None] * (len(keys) - 1) + [table],
            "lengths": [None if n is None else torch.tensor([n], dtype=torch.int32, device=device) for n in counts],
            "mask": mask,
        }

    flops = 4 * batch * queries * sum(keys) * heads * head_dim
    moved = 2 * batch * (queries + sum(keys)) * heads * head_dim * torch.empty(0, dtype=dtype).element_size()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    return Case(name, inputs, 0 if small else flops, 0 if small else moved, small, tolerance)


def cases() -> list[Case]:
    """LiveAvatar 14B: 3,168 queries, a ring of 12 latent frames and 2,640 condition keys; text; audio tokens."""
    bf16 = torch.bfloat16
    return [
        _case(
            "liveavatar-14b", 3168, [12672, 2640], 40, 128, dtype=bf16, rotated=2640, lengths=[12672, None], small=False
        ),
        _case("liveavatar-14b text", 3168, [512], 40, 128, dtype=bf16, small=False),
        _case("liveavatar-14b audio", 1056, [5], 40, 128, batch=3, dtype=bf16, small=False),
        _case("one segment", 3, [5], 2, 64, batch=3),
        _case("tails and a table on load", 37, [130, 21], 2, 32, batch=2, rotated=13, lengths=[129, None]),
        _case("many queries and a table", 131, [40, 70], 1, 32, rotated=33, lengths=[0, 33]),
        _case("a mask", 33, [40, 20], 2, 32, masked=True),
        _case("half precision", 20, [300], 1, 128, dtype=bf16, lengths=[257]),
    ]


OP = Op("rope_attention", rope_attention, reference, cases)
