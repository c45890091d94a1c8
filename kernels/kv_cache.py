"""The streaming form of `qk_norm_rope`: queries out, keys and values straight into a ring, in one launch.

    q, k = qk_norm_rope(qkv[..., :D], qkv[..., D:2D], ...);  ring.k[write : write + L] = k;  ring.v[...] = qkv[..., 2D:]

Shapes: qkv [B, L, 3D] (rows may be strided); weights [D]; rope [(B,) L', d/2, 2] float32 or None; ring_k, ring_v
[B, S, H, d] whose heads lie side by side; `write` int32 [1] on the device: the row where the block begins, so that one
captured graph serves every place in the ring. Result q [B, L, H, d]. Rows that fall outside the ring are not written.

`qkv_norm_rope_fp8` writes e4m3: q8 = e4m3(scale_q * q), k8 likewise, with one static scale a head. A normed row has a
norm of at most sqrt(D), a rotation keeps the norm of a pair, so |q| <= sqrt(D) * max |weight| of the head: the scale
448 / bound (`static_scales`) cannot overflow, and e4m3 has the same relative precision over fifteen octaves, so nothing
is gained by measuring. Values go the same way (`ring_v`) in bfloat16, or in e4m3 with a scale a head that is known
beforehand (`scale_v`); `fp8_values.store_values_fp8` measures the scale of each channel first.

Dtypes: rounding points of `qk_norm_rope`; the ring's dtype last; e4m3 rounds once, from the float32 rotation.
Heads of another size than 16, 32, 64 or 128 take the reference, which reads `write` on the host and so cannot be
captured as a CUDA graph.
Non-finite values: stay in their token. Errors: ValueError when shapes do not fit, or the heads and channels of a row of
a ring do not lie side by side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Op, randn
from .dispatch import triton_runs
from .qk_norm_rope import apply_rope, check_projection, check_table, head_norm_reference
from .qk_rows import FP8_MAX, HEAD_DIMS, Part, Slots, prepare_rows

E4M3 = torch.float8_e4m3fn
_FP8_MAX = float(FP8_MAX.value)


def static_scales(weight: Tensor, num_heads: int) -> Tensor:
    """Float32 [H]: what heads normed by `weight` [D] can be multiplied by without leaving the range of e4m3."""
    bound = math.sqrt(weight.numel()) * weight.float().abs().unflatten(0, (num_heads, -1)).amax(1)
    return _FP8_MAX / bound.clamp(min=1e-12)


def quantize_heads(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, H, d] times scale [H], saturated and rounded to e4m3; NaN stays NaN."""
    return (x.float() * scale[:, None]).clamp(-_FP8_MAX, _FP8_MAX).to(E4M3)


def ring_rows(slots: Slots, write: int, tokens: int) -> Tensor:
    """Rows of the buffer [tokens] where the tokens of a block go that is written from valid row `write` on."""
    row = torch.arange(write, write + tokens)
    return row // slots.rows * slots.stride + row % slots.rows


def qkv_norm_rope_reference(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    ring_k: Tensor,
    ring_v: Tensor,
    write: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    q, k, v = qkv.chunk(3, -1)
    rows = int(write) + torch.arange(qkv.shape[1], device=qkv.device)
    inside = (rows >= 0) & (rows < ring_k.shape[1])
    k = head_norm_reference(k, weight_k, rope, num_heads, eps, ring_k.dtype)
    ring_k[:, rows[inside]] = k[:, inside]
    ring_v[:, rows[inside]] = v.unflatten(-1, (num_heads, -1)).to(ring_v.dtype)[:, inside]
    return head_norm_reference(q, weight_q, rope, num_heads, eps, ring_k.dtype).contiguous()


def qkv_norm_rope_fp8_reference(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    ring_k8: Tensor,
    ring_v: Tensor | None,
    write: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    slots: Slots,
    num_heads: int,
    eps: float = 1e-6,
    scale_v: Tensor | None = None,
) -> Tensor:
    q, k, v = qkv.chunk(3, -1)
    valid = int(write) + torch.arange(qkv.shape[1], device=qkv.device)
    inside = (valid >= 0) & (valid < slots.capacity)
    rows = ring_rows(slots, int(write), qkv.shape[1]).to(qkv.device)[inside]
    k8 = quantize_heads(head_norm_reference(k, weight_k, rope, num_heads, eps, torch.float32), scale_k)
    ring_k8.view(torch.uint8)[:, rows] = k8.view(torch.uint8)[:, inside]  # not every device indexes e4m3
    if ring_v is not None:
        v = v.unflatten(-1, (num_heads, -1))
        if scale_v is None:
            ring_v[:, rows] = v.to(ring_v.dtype)[:, inside]
        else:
            ring_v.view(torch.uint8)[:, rows] = quantize_heads(v, scale_v).view(torch.uint8)[:, inside]
    return quantize_heads(head_norm_reference(q, weight_q, rope, num_heads, eps, torch.float32), scale_q)


@dataclass(frozen=True)
class JoinedCache:
    """Condition and ring rows of one layer in one buffer, k and v [B, C + S, H, d], so that a library's attention reads
    them as one segment without copies.

    The condition comes first: whether the ring is growing or full, the valid rows C + length are then a prefix.
    """

    k: Tensor
    v: Tensor
    condition_rows: int

    @classmethod
    def allocate(
        cls,
        batch: int,
        condition_rows: int,
        ring_rows: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> "JoinedCache":
        shape = (batch, condition_rows + ring_rows, num_heads, head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(k, v, condition_rows)

    @property
    def ring(self) -> tuple[Tensor, Tensor]:
        """Views [B, S, H, d] for `qkv_norm_rope` to write into."""
        return self.k[:, self.condition_rows :], self.v[:, self.condition_rows :]

    @property
    def condition(self) -> tuple[Tensor, Tensor]:
        """Views [B, C, H, d]: rotated keys (`rotate_rows_into`), values."""
        return self.k[:, : self.condition_rows], self.v[:, : self.condition_rows]

    def valid(self, ring_length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, C + ring_length, H, d] to attend."""
        rows = self.condition_rows + ring_length
        return self.k[:, :rows], self.v[:, :rows]


def qkv_norm_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    ring_k: Tensor,
    ring_v: Tensor,
    write: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Queries of a streaming block in the ring's dtype; writes its keys and values. Inference only; see the module."""
    _check_block(qkv, weight_q, weight_k, rope, num_heads)
    _check_ring(ring_k, qkv, num_heads)
    _check_ring(ring_v, qkv, num_heads)
    return torch.ops.kinora.qkv_norm_rope(qkv, weight_q, weight_k, rope, ring_k, ring_v, write, num_heads, eps)


def qkv_norm_rope_fp8(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    ring_k8: Tensor,
    ring_v: Tensor | None,
    write: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    slots: Slots,
    num_heads: int,
    eps: float = 1e-6,
    scale_v: Tensor | None = None,
) -> Tensor:
    """Queries in e4m3; writes e4m3 keys and, if `ring_v` is given, values in its dtype, e4m3 exactly with `scale_v`.

    Inference only.
    """
    _check_block(qkv, weight_q, weight_k, rope, num_heads)
    for ring in (ring_k8,) if ring_v is None else (ring_k8, ring_v):
        _check_ring(ring, qkv, num_heads)
        if ring.shape[1] != slots.length:
            raise ValueError(f"a ring has {ring.shape[1]} rows; {slots} need {slots.length}")
    if ring_v is not None and (ring_v.dtype == E4M3) != (scale_v is not None):
        raise ValueError(f"values go into a ring of {ring_v.dtype}; pass `scale_v` exactly when it is e4m3")
    for scale in (scale_q, scale_k) if scale_v is None else (scale_q, scale_k, scale_v):
        if scale.shape != (num_heads,) or scale.dtype != torch.float32:
            raise ValueError(
                f"a scale has {scale.dtype} of shape {tuple(scale.shape)}; it must be float32 [{num_heads}]"
            )
    layout = [slots.count, slots.rows, slots.stride]
    return torch.ops.kinora.qkv_norm_rope_fp8(
        qkv, weight_q, weight_k, rope, ring_k8, ring_v, write, scale_q, scale_k, layout, num_heads, eps, scale_v
    )


def rotate_rows_into(x: Tensor, rope: Tensor | None, out: Tensor, scale: Tensor | None = None) -> None:
    """Rotate x [B, L, H, d] into the leading rows of out [B, S >= L, H, d]; e4m3 with `scale` [H]. Inference only."""
    fits = out.shape[0] == x.shape[0] and out.shape[1] >= x.shape[1] and out.shape[2:] == x.shape[2:]
    if not fits or x.dtype == E4M3 or (out.dtype == E4M3) != (scale is not None):
        raise ValueError(
            f"cannot rotate {x.dtype} {tuple(x.shape)} into {out.dtype} {tuple(out.shape)}; give at least as many "
            "rows, rows that are not quantised yet, and a scale exactly when the result is e4m3"
        )
    _check_rows(out)
    if rope is not None:
        check_table(rope, x.shape)
    torch.ops.kinora.rotate_rows_into(x, rope, out, scale)


def _check_block(qkv: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor | None, num_heads: int) -> None:
    if qkv.dim() != 3 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be [B, L, 3 D]")
    check_projection(qkv[..., : qkv.shape[-1] // 3], (weight_q, weight_k), rope, num_heads)


def _check_ring(ring: Tensor, qkv: Tensor, num_heads: int) -> None:
    head_dim = qkv.shape[-1] // 3 // num_heads
    batch, tokens = qkv.shape[:2]
    if ring.dim() != 4 or ring.shape != (batch, ring.shape[1], num_heads, head_dim) or ring.shape[1] < tokens:
        raise ValueError(
            f"a ring has shape {tuple(ring.shape)}; a block of {tokens} tokens needs "
            f"[{batch}, S >= {tokens}, {num_heads}, {head_dim}]"
        )
    _check_rows(ring)


def _check_rows(out: Tensor) -> None:
    """ValueError unless the kernel, which knows the strides of batch and row alone, may write into `out`."""
    if out.stride()[2:] != (out.shape[3], 1):
        raise ValueError(
            f"a cache {tuple(out.shape)} has strides {out.stride()}; heads and channels of a row must lie side by side"
        )


def _kernel_runs(out: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel writes these heads; it knows sizes that are powers of two."""
    return triton_runs(out, *others) and out.shape[3] in HEAD_DIMS


@torch.library.custom_op("kinora::qkv_norm_rope", mutates_args=("ring_k", "ring_v"))
def _qkv_norm_rope_op(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    ring_k: Tensor,
    ring_v: Tensor,
    write: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    if not _kernel_runs(ring_k, qkv, weight_q, weight_k, rope, ring_v, write):
        return qkv_norm_rope_reference(qkv, weight_q, weight_k, rope, ring_k, ring_v, write, num_heads, eps)
    q, k, v = qkv.chunk(3, -1)
    slots = Slots(1, ring_k.shape[1], ring_k.shape[1])
    out = torch.empty((*q.shape[:2], *ring_k.shape[2:]), dtype=ring_k.dtype, device=qkv.device)
    parts = [
        Part(q, out, weight_q, rotate=True),
        Part(k, ring_k, weight_k, rotate=True, write=write),
        Part(v, ring_v, write=write),
    ]
    prepare_rows(parts, num_heads, rope, eps, slots)
    return out


@_qkv_norm_rope_op.register_fake
def _fake_queries(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor | None, ring: Tensor, *_: Any
) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], *ring.shape[2:]), dtype=ring.dtype)


@torch.library.custom_op("kinora::qkv_norm_rope_fp8", mutates_args=("ring_k8", "ring_v"))
def _qkv_norm_rope_fp8_op(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor | None,
    ring_k8: Tensor,
    ring_v: Tensor | None,
    write: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    slots: list[int],
    num_heads: int,
    eps: float,
    scale_v: Tensor | None = None,
) -> Tensor:
    """`slots`: count, rows, stride of `Slots`."""
    layout = Slots(*slots)
    if not _kernel_runs(ring_k8, qkv, weight_q, weight_k, rope, ring_v, write, scale_q, scale_k, scale_v):
        return qkv_norm_rope_fp8_reference(
            qkv, weight_q, weight_k, rope, ring_k8, ring_v, write, scale_q, scale_k, layout, num_heads, eps, scale_v
        )
    q, k, v = qkv.chunk(3, -1)
    out = torch.empty((*q.shape[:2], *ring_k8.shape[2:]), dtype=E4M3, device=qkv.device)
    parts = [
        Part(q, out, weight_q, rotate=True, scale=scale_q),
        Part(k, ring_k8, weight_k, rotate=True, scale=scale_k, write=write),
    ]
    if ring_v is not None:
        parts.append(Part(v, ring_v, scale=scale_v, write=write))
    prepare_rows(parts, num_heads, rope, eps, layout)
    return out


_qkv_norm_rope_fp8_op.register_fake(_fake_queries)


@torch.library.custom_op("kinora::rotate_rows_into", mutates_args=("out",))
def _rotate_rows_into_op(x: Tensor, rope: Tensor | None, out: Tensor, scale: Tensor | None) -> None:
    if _kernel_runs(out, x, rope, scale):
        prepare_rows([Part(x, out, rotate=True, scale=scale)], x.shape[2], rope)
    else:
        turned = apply_rope(x, rope, torch.float32)
        out[:, : x.shape[1]] = turned if scale is None else quantize_heads(turned, scale)


_rotate_rows_into_op.register_fake(lambda *_: None)


def _block_inputs(
    tokens: int, ring: int, write: int, heads: int, head_dim: int, dtype: torch.dtype, batch: int = 1
) -> Callable[[torch.device, torch.Generator], dict[str, object]]:
    dim = heads * head_dim

    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return randn(*shape, device=device, generator=generator, dtype=dtype)

        angle = draw(tokens, head_dim // 2, dtype=torch.float32)
        return {
            "qkv": draw(batch, tokens, 3 * dim),
            "weight_q": draw(dim),
            "weight_k": draw(dim),
            "rope": torch.stack((angle.cos(), angle.sin()), -1),
            "ring_k": draw(batch, ring, heads, head_dim),
            "ring_v": draw(batch, ring, heads, head_dim),
            "write": torch.tensor([write], dtype=torch.int32, device=device),
            "num_heads": heads,
        }

    return inputs


def cases() -> list[Case]:
    """A streaming block of LiveAvatar 14B (each of q, k, v read and written once), and awkward sizes."""
    tokens, dim = 3168, 5120
    moved = 2 * 3 * tokens * dim * 2 + tokens * 128 * 4
    real = _block_inputs(tokens, 4 * tokens, 2 * tokens, 40, 128, torch.bfloat16)
    return [
        Case("liveavatar-14b", real, flops=0, bytes=moved),
        Case("in the middle", _block_inputs(5, 16, 3, 3, 32, torch.float32, 2), small=True, tolerance=1e-5),
        Case("over the end", _block_inputs(5, 8, 6, 2, 64, torch.float32), small=True, tolerance=1e-5),
    ]


def _fp8_case(
    name: str, tokens: int, slots: Slots, write: int, heads: int, head_dim: int, batch: int = 1, *,
    values: torch.dtype | None, small: bool = True,
) -> Case:  # fmt: skip
    """`values`: the dtype in which they are kept, None to leave them out."""
    dtype = torch.float32 if small else torch.bfloat16
    block = _block_inputs(tokens, slots.length, write, heads, head_dim, dtype, batch)

    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        given: dict[str, Any] = block(device, generator)
        ring_k, ring_v = given.pop("ring_k"), given.pop("ring_v")
        scales = {f"scale_{name}": static_scales(given[f"weight_{name}"], heads) for name in ("q", "k")}
        if values == E4M3:
            scales["scale_v"] = torch.full((heads,), 100.0, device=device)
        kept = None if values is None else ring_v.to(values)
        return given | scales | {"ring_k8": ring_k.to(E4M3), "ring_v": kept, "slots": slots}

    moved = tokens * (batch * heads * head_dim * (6 + (2 + values.itemsize if values else 0)) + head_dim * 4)
    return Case(name, inputs, 0, 0 if small else moved, small, tolerance=5e-2)


def fp8_cases() -> list[Case]:
    """A streaming block of LiveAvatar 14B with values in bfloat16, in e4m3 and without; slots with padding."""
    ring, padded, half = Slots(4, 3168, 3200), Slots(3, 5, 8), torch.bfloat16
    return [
        _fp8_case("liveavatar-14b", 3168, ring, 2 * 3168, 40, 128, values=half, small=False),
        _fp8_case("liveavatar-14b, no values", 3168, ring, 2 * 3168, 40, 128, values=None, small=False),
        _fp8_case("liveavatar-14b, e4m3 values", 3168, ring, 2 * 3168, 40, 128, values=E4M3, small=False),
        _fp8_case("a padded slot", 5, padded, 5, 3, 32, 2, values=half),
        _fp8_case("e4m3 values", 5, padded, 3, 3, 32, 2, values=E4M3),
        _fp8_case("over the end", 5, padded, 12, 2, 64, values=None),
    ]


OP = Op(
    "qkv_norm_rope",
    qkv_norm_rope,
    qkv_norm_rope_reference,
    cases,
    mutates=("ring_k", "ring_v"),
    differentiable=False,
)
FP8_OP = Op(
    "qkv_norm_rope_fp8",
    qkv_norm_rope_fp8,
    qkv_norm_rope_fp8_reference,
    fp8_cases,
    mutates=("ring_k8", "ring_v"),
    differentiable=False,
)
