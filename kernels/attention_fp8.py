"""Attention over an FP8 cache: e4m3 queries and keys, values in e4m3 ("fp8") or in bfloat16 ("mixed").

    out = softmax(q K^T / sqrt(d)) V,   q = q8 / scale_q, K = k8 / scale_k (one scale a head), V = v8 * descale

Shapes: q8 [B, Lq, H, d] e4m3; the cache is a list of `Fp8Segment`; `qk_descale` float32 [H] = 1 / (scale_q * scale_k).
Result [B, Lq, H, d] bfloat16. Dtypes: both products accumulate in float32, softmax in float32; the weights round to
e4m3 (times 448, against the maximum) or to bfloat16.
Error: relative L2 of the result on uncorrelated normal data, 15,312 keys of d = 128: 5.3e-2 ("fp8") and 3.9e-2
("mixed": the rounding of q and k alone) for scores of unit variance, 3.9e-2 and 1.0e-2 for scores of variance 1/16.
Non-finite values: as in `rope_attention`, but what lies beyond the valid rows of `v` must be finite (it is multiplied
by zero); `Fp8Segment.allocate` makes it zero. A query without keys gives zero. Inference only.
Errors: ValueError when segments and queries do not fit.
On a Hopper GPU a kernel in Gluon serves e4m3 values with d = 128 (`attention_hopper`).
Source: scales by head and channel after FlashAttention-3 (Shah et al., 2024) and SageAttention2 (Zhang et al., 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
from torch import Tensor

from . import attention_hopper
from .attention_forward import LOG2E, Tiles
from .attention_fp8_kernel import fp8_kernel
from .cases import Case, Op, randn
from .dispatch import triton_runs
from .fp8_values import ROWS, quantize_values, store_values_fp8
from .kv_cache import E4M3, quantize_heads, ring_rows, rotate_rows_into
from .qk_rows import HEAD_DIMS, Slots

Values = Literal["fp8", "mixed"]


@dataclass(frozen=True)
class Fp8Segment:
    """Keys and values of one layer in slots: a ring of blocks, or one slot of condition tokens.

    Slots are padded to multiples of 128 rows, S = slots.length rows in all. `k8` [B, S, H, d] e4m3. "fp8": `v`
    [B, H, d, S] e4m3 and `v_descale` [B, slots, H, d] float32; "mixed": `v` [B, S, H, d] bfloat16, no `v_descale`.
    `length` int32 [1] on the device: valid rows, padding not counted, or None for all.
    """

    k8: Tensor
    v: Tensor
    v_descale: Tensor | None
    slots: Slots
    length: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        batch: int,
        slot_count: int,
        slot_rows: int,
        num_heads: int,
        head_dim: int,
        values: Values = "fp8",
        *,
        length: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> "Fp8Segment":
        """Zeros for `slot_count` blocks of `slot_rows` rows."""
        if values not in ("fp8", "mixed"):
            raise ValueError(f"values {values!r} are not known; use 'fp8' or 'mixed'")
        slots = Slots(slot_count, slot_rows, -(-slot_rows // ROWS) * ROWS)
        rows = (batch, slots.length, num_heads, head_dim)
        k8 = torch.zeros(rows, dtype=E4M3, device=device)
        if values == "mixed":
            return cls(k8, torch.zeros(rows, dtype=torch.bfloat16, device=device), None, slots, length)
        v8 = torch.zeros((batch, num_heads, head_dim, slots.length), dtype=E4M3, device=device)
        descale = torch.ones((batch, slot_count, num_heads, head_dim), device=device)
        return cls(k8, v8, descale, slots, length)

    def with_length(self, length: Tensor | None) -> "Fp8Segment":
        """The same buffers with another count of valid rows."""
        return replace(self, length=length)

    def store_values(self, v: Tensor, write: Tensor | None = None) -> None:
        """Values [B, slot_rows, H, d] of one block into its slot, in e4m3."""
        if self.v_descale is None:
            raise ValueError("a mixed segment holds bfloat16 values; pass it as `ring_v` of qkv_norm_rope_fp8")
        store_values_fp8(v, self.v, self.v_descale, self.slots, write)

    def store_condition(self, k: Tensor, v: Tensor, rope: Tensor | None, scale_k: Tensor) -> None:
        """Fill a segment of one slot: keys [B, L, H, d] rotated by `rope` and quantised, and their values."""
        self.rotate_keys(k, rope, scale_k)
        if self.v_descale is None:
            self.v[:, : v.shape[1]] = v
        else:
            self.store_values(v)

    def rotate_keys(self, k: Tensor, rope: Tensor | None, scale_k: Tensor) -> None:
        """Rotate and quantise leading rows [B, L, H, d] again, for example the reference, which moves every block."""
        rotate_rows_into(k, rope, self.k8, scale_k)

    def dequantize(self, scale_k: Tensor) -> tuple[Tensor, Tensor]:
        """Valid keys and values [B, length, H, d] in float32."""
        count = self.slots.capacity if self.length is None else min(int(self.length), self.slots.capacity)
        rows = ring_rows(self.slots, 0, count).to(self.k8.device)
        k = self.k8.float()[:, rows] / scale_k[:, None]
        if self.v_descale is None:
            return k, self.v.float()[:, rows]
        v = self.v.float().unflatten(3, (self.slots.count, self.slots.stride))  # [B, H, d, slots, rows]
        v = v * self.v_descale.permute(0, 2, 3, 1)[..., None]
        return k, v.flatten(3)[..., rows].permute(0, 3, 1, 2)


def reference(q8: Tensor, segments: Sequence[Fp8Segment], qk_descale: Tensor) -> Tensor:
    """The same roundings in plain PyTorch, except that weights round against the maximum over all keys at once."""
    ones = torch.ones_like(qk_descale)
    pairs = [segment.dequantize(ones) for segment in segments]
    k, v = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))  # [B, L, H, d]
    scores = torch.einsum("bqhd,bkhd->bhqk", q8.float(), k) * (qk_descale * q8.shape[3] ** -0.5)[:, None, None]
    if k.shape[1] == 0:
        return q8.new_zeros(q8.shape, dtype=torch.bfloat16)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1).transpose(1, 2)[..., None]  # [B, Lq, H, 1]
    if segments[0].v_descale is None:
        rounded = weights.to(torch.bfloat16).float()
    else:
        rounded = (weights * 448.0).to(E4M3).float() / 448.0
    return (torch.einsum("bhqk,bkhd->bqhd", rounded, v) / total).to(torch.bfloat16)


def choose_tiles(head_dim: int, values: Values) -> Tiles:
    """Tiles for Hopper; a tile must not be longer than the padding of a slot."""
    if head_dim < 64:
        return Tiles(128, 64, 4, 3)
    return Tiles(64, 128, 4, 3) if values == "fp8" else Tiles(128, 128, 8, 3)  # measured on an H200, d = 128


def attention_fp8(q8: Tensor, segments: Sequence[Fp8Segment], qk_descale: Tensor, tiles: Tiles | None = None) -> Tensor:
    """Attention over an FP8 cache; see the module docstring. `tiles` asks for the Triton kernel with these (tuning)."""
    _check(q8, segments, qk_descale)
    config = None if tiles is None else [tiles.block_m, tiles.block_n, tiles.num_warps, tiles.num_stages]
    return torch.ops.kinora.attention_fp8(
        q8,
        [s.k8 for s in segments],
        [s.v for s in segments],
        [s.v_descale for s in segments],
        [s.length for s in segments],
        qk_descale,
        [n for s in segments for n in (s.slots.count, s.slots.rows, s.slots.stride)],
        config,
    )


def _check(q8: Tensor, segments: Sequence[Fp8Segment], qk_descale: Tensor) -> None:
    batch, _, heads, head_dim = q8.shape
    if q8.dtype != E4M3 or head_dim not in HEAD_DIMS[1:] or qk_descale.shape != (heads,):
        raise ValueError(
            f"queries are {q8.dtype} {tuple(q8.shape)} with descale {tuple(qk_descale.shape)}; they must be e4m3 "
            f"[B, L, H, d] with d in {HEAD_DIMS[1:]} and descale [{heads}]"
        )
    if not segments:
        raise ValueError("no segment is given; attention needs keys")
    for i, s in enumerate(segments):
        if s.k8.shape != (batch, s.slots.length, heads, head_dim):
            raise ValueError(
                f"segment {i} has keys {tuple(s.k8.shape)}; queries {tuple(q8.shape)} and {s.slots} do not fit"
            )
        if (s.v_descale is None) != (segments[0].v_descale is None):
            raise ValueError(f"segment {i} keeps its values otherwise than segment 0; allocate all alike")


@torch.library.custom_op("kinora::attention_fp8", mutates_args=())
def _attention_fp8_op(
    q8: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    descales: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    qk_descale: Tensor,
    slots: Sequence[int],
    tiles: Sequence[int] | None,
) -> Tensor:
    """`slots`: count, rows, stride of each segment; `tiles`: the four numbers of `Tiles`."""
    if not triton_runs(q8, *keys, *values, qk_descale):
        layouts = [Slots(*slots[i : i + 3]) for i in range(0, len(slots), 3)]
        segments = [Fp8Segment(*parts) for parts in zip(keys, values, descales, layouts, lengths, strict=True)]
        return reference(q8, segments, qk_descale).contiguous()
    batch, queries, heads, head_dim = q8.shape
    out = torch.empty(q8.shape, dtype=torch.bfloat16, device=q8.device)
    if out.numel() == 0:
        return out
    qk_descale, descales = qk_descale.contiguous(), [None if d is None else d.contiguous() for d in descales]
    if not tiles and attention_hopper.serves_fp8(q8, keys, values, descales, slots):
        return attention_hopper.forward_fp8(q8, keys, values, descales, lengths, qk_descale, slots)
    chosen = Tiles(*tiles) if tiles else choose_tiles(head_dim, "mixed" if descales[0] is None else "fp8")
    q8 = q8.contiguous()
    # of keys: batch, row, head; of values: batch, row (bfloat16) or channel (e4m3), head
    strides = [
        (*k.stride()[:3], *(v.stride()[:3] if d is None else (v.stride(0), v.stride(2), v.stride(1))))
        for k, v, d in zip(keys, values, descales, strict=True)
    ]
    fp8_kernel[(triton.cdiv(queries, chosen.block_m), batch * heads)](
        q8,
        tuple(keys),
        tuple(values),
        tuple(descales),
        tuple(lengths),
        qk_descale,
        out,
        tuple(slots),
        tuple(n for group in strides for n in group),
        q8.stride()[:3],
        queries,
        heads,
        head_dim**-0.5 * LOG2E.value,
        D=head_dim,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out


@_attention_fp8_op.register_fake
def _(
    q8: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    descales: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    qk_descale: Tensor,
    slots: Sequence[int],
    tiles: Sequence[int] | None,
) -> Tensor:
    return q8.new_empty(q8.shape, dtype=torch.bfloat16)


def _case(
    name: str, queries: int, ring: tuple[int, int], length: int, condition: int, heads: int, head_dim: int, *,
    values: Values, batch: int = 1, small: bool = True,
) -> Case:  # fmt: skip
    """`ring`: slots and rows of each; `length`: its valid rows."""

    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        def draw(rows: int) -> Tensor:
            return randn(batch, rows, heads, head_dim, device=device, generator=generator)

        scale = torch.linspace(4.0, 8.0, heads, device=device)

        def segment(slot_count: int, slot_rows: int, valid: Tensor | None = None) -> Fp8Segment:
            made = Fp8Segment.allocate(
                batch, slot_count, slot_rows, heads, head_dim, values, length=valid, device=device
            )
            for slot in range(slot_count):
                rows = slice(slot * made.slots.stride, slot * made.slots.stride + slot_rows)
                made.k8[:, rows] = quantize_heads(draw(slot_rows), scale)
                if made.v_descale is None:
                    made.v[:, rows] = draw(slot_rows)
                else:
                    made.v[..., rows], made.v_descale[:, slot] = quantize_values(draw(slot_rows))
            return made

        valid = torch.tensor([length], dtype=torch.int32, device=device)
        segments = [segment(*ring, valid), segment(1, condition)]
        return {"q8": quantize_heads(draw(queries), scale), "segments": segments, "qk_descale": 1 / scale**2}

    keys = length + condition
    flops = 4 * batch * queries * keys * heads * head_dim
    moved = batch * heads * head_dim * (3 * queries + keys * (2 if values == "fp8" else 3))
    # the kernel rounds weights against the running maximum, the reference against the last one
    return Case(name, inputs, 0 if small else flops, 0 if small else moved, small, tolerance=3e-2)


def cases() -> list[Case]:
    """LiveAvatar 14B: 3,168 queries, a full ring of 4 blocks and 2,640 condition keys; rings with padding and tails."""
    real = (3168, (4, 3168), 12672, 2640, 40, 128)
    return [
        _case("liveavatar-14b, fp8", *real, values="fp8", small=False),
        _case("liveavatar-14b, mixed", *real, values="mixed", small=False),
        _case("tails, fp8", 21, (2, 130), 200, 9, 2, 32, values="fp8", batch=2),
        _case("tails, mixed", 21, (2, 130), 200, 9, 2, 32, values="mixed", batch=2),
        _case("an empty ring", 3, (1, 20), 0, 5, 1, 64, values="fp8"),
    ]


OP = Op("attention_fp8", attention_fp8, reference, cases, differentiable=False)
