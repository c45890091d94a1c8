"""The data of `bench.attention`: a stream of LiveAvatar 14B whose ring is full, in every layout of a cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention_fp8 import Fp8Segment, Values
from ..kernels.kv_cache import JoinedCache, qkv_norm_rope, qkv_norm_rope_fp8, rotate_rows_into, static_scales

BF16 = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter in tests, in Triton's interpreter


@dataclass(frozen=True)
class Shape:
    """Tokens of a block, blocks of the ring, condition tokens, those of them that move, heads, head size."""

    tokens: int = 3168
    blocks: int = 4
    condition: int = 2640
    moving: int = 1056
    heads: int = 40
    head_dim: int = 128

    @property
    def ring(self) -> int:
        return self.blocks * self.tokens

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def flops(self) -> int:
        return 4 * self.tokens * (self.ring + self.condition) * self.dim


def table_of(rows: int, head_dim: int) -> Tensor:
    angle = torch.randn(rows, head_dim // 2, device=DEVICE)
    return torch.stack((angle.cos(), angle.sin()), -1)


def count(n: int) -> Tensor:
    return torch.tensor([n], dtype=torch.int32, device=DEVICE)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [B, L, H, d] in float32, head by head so that the scores fit."""
    out = torch.empty(q.shape, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h].float() @ k[b, :, h].float().T * q.shape[3] ** -0.5
            out[b, :, h] = scores.softmax(-1) @ v[b, :, h].float()
    return out


@dataclass
class Stream:
    """A full ring and condition keys in every layout, filled by the ops themselves from the same random blocks."""

    shape: Shape
    q: Tensor
    q8: Tensor
    joined: JoinedCache
    raw_k: Tensor
    rope: Tensor
    segments: dict[Values, list[Fp8Segment]]
    qk_descale: Tensor
    length: Tensor
    parts: dict[str, Any]
    wide: tuple[Tensor, Tensor, Tensor]
    """q, k, v in float32, from float32 blocks."""

    @classmethod
    def draw(cls, s: Shape, scale: float = 1.0) -> "Stream":
        heads, d = s.heads, s.head_dim
        weight = torch.full((s.dim,), scale, device=DEVICE, dtype=BF16)
        weights, scales = (weight, weight), (static_scales(weight, heads), static_scales(weight, heads))
        joined = JoinedCache.allocate(1, s.condition, s.ring, heads, d, device=DEVICE)
        wide = JoinedCache.allocate(1, s.condition, s.ring, heads, d, dtype=torch.float32, device=DEVICE)
        modes: tuple[Values, ...] = ("fp8", "mixed")
        rings = {m: Fp8Segment.allocate(1, s.blocks, s.tokens, heads, d, m, device=DEVICE) for m in modes}
        conditions = {m: Fp8Segment.allocate(1, 1, s.condition, heads, d, m, device=DEVICE) for m in modes}
        rope = table_of(s.tokens, d)
        for block in range(s.blocks):
            qkv, write = torch.randn(1, s.tokens, 3 * s.dim, device=DEVICE, dtype=BF16), count(block * s.tokens)
            q = qkv_norm_rope(qkv, *weights, rope, *joined.ring, write, heads)
            wide_q = qkv_norm_rope(qkv.float(), weight.float(), weight.float(), rope, *wide.ring, write, heads)
            ring = rings["mixed"]
            q8 = qkv_norm_rope_fp8(qkv, *weights, rope, ring.k8, ring.v, write, *scales, ring.slots, heads)
            rings["fp8"].store_values(qkv[..., 2 * s.dim :].unflatten(-1, (heads, d)), write)
        rings["fp8"].k8.copy_(rings["mixed"].k8)
        raw_k, condition_v = (torch.randn(1, s.condition, heads, d, device=DEVICE, dtype=BF16) for _ in range(2))
        raw_k *= scale
        condition_rope = table_of(s.condition, d)
        for cache in (joined, wide):
            rotate_rows_into(raw_k, condition_rope, cache.condition[0])
            cache.condition[1].copy_(condition_v)
        for condition in conditions.values():
            condition.store_condition(raw_k, condition_v, condition_rope, scales[1])
        length = count(s.ring)
        segments = {m: [rings[m].with_length(length), conditions[m]] for m in rings}
        parts = {"qkv": qkv, "weights": weights, "scales": scales, "rope": rope, "rings": rings, "write": count(0)}
        parts["condition_v"] = condition_v
        return cls(
            s, q, q8, joined, raw_k, condition_rope, segments, 1 / (scales[0] * scales[1]), length, parts,
            (wide_q, wide.k, wide.v),
        )  # fmt: skip

    def two_segments(self) -> tuple[list[Tensor], list[Tensor]]:
        (ring_k, ring_v), (condition_k, condition_v) = self.joined.ring, self.joined.condition
        return [ring_k, condition_k], [ring_v, condition_v]
