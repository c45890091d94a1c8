"""Memories of a stream in static buffers: what a captured CUDA graph writes and reads at every block.

Where a block stands is on the device (`Position`), so that one graph serves the growing and the rolling ring. The
condition keys lie rotated beside the ring; only the reference's rows move with the stream and are rotated anew for each
step. Two formats: bfloat16 (or float32), and e4m3 keys with e4m3 or bfloat16 values.

Legend: S ring rows, C condition tokens, P tokens of a frame (the reference), L tokens of a block, H heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.attention_fp8 import Fp8Segment, Values, attention_fp8
from ...kernels.kv_cache import JoinedCache, qkv_norm_rope, qkv_norm_rope_fp8, rotate_rows_into, static_scales
from .liveavatar_cache import ConditionCache, KeyValue, Projected


@dataclass(frozen=True)
class Position:
    """Int32 [1] on the device: ring row where the block is written, and rows that are valid once it is."""

    write: Tensor
    length: Tensor

    @classmethod
    def of(cls, block: Tensor, tokens: int, capacity: int) -> "Position":
        """For block number `block` (int64 [1]) of `tokens` tokens in a ring of `capacity` rows; no host read."""
        slots = capacity // tokens
        write = (block % slots) * tokens
        length = (block + 1).clamp(max=slots) * tokens
        return cls(write.int(), length.int())


@dataclass(frozen=True)
class PlainMemory:
    """One layer's keys and values, condition and ring in one buffer; `reference` [B, P, H, d]: its keys not rotated."""

    cache: JoinedCache
    reference: Tensor
    reference_rope: Tensor
    position: Position

    def attend(self, projected: Projected, rope: Tensor) -> Tensor:
        ring_k, ring_v = self.cache.ring
        k, v = self.cache.condition
        rotate_rows_into(self.reference, self.reference_rope, k)
        q = qkv_norm_rope(*_norming(projected, rope), ring_k, ring_v, self.position.write, *_shape(projected))
        return ops.rope_attention(q, [k, ring_k], [v, ring_v], lengths=[None, self.position.length])


@dataclass(frozen=True)
class Fp8Memory:
    """The same in e4m3; scales float32 [H] of queries and keys follow from the norms' weights (`static_scales`)."""

    ring: Fp8Segment
    condition: Fp8Segment
    reference: Tensor
    reference_rope: Tensor
    position: Position
    scale_q: Tensor
    scale_k: Tensor
    qk_descale: Tensor

    def attend(self, projected: Projected, rope: Tensor) -> Tensor:
        ring, mixed = self.ring, self.ring.v_descale is None
        self.condition.rotate_keys(self.reference, self.reference_rope, self.scale_k)
        q = qkv_norm_rope_fp8(
            *_norming(projected, rope),
            ring.k8,
            ring.v if mixed else None,
            self.position.write,
            self.scale_q,
            self.scale_k,
            ring.slots,
            *_shape(projected),
        )
        if not mixed:
            ring.store_values(projected.heads(projected.v), self.position.write)
        return attention_fp8(q, [self.condition, ring.with_length(self.position.length)], self.qk_descale)


def _norming(projected: Projected, rope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = torch.cat((projected.q, projected.k, projected.v), -1)  # the compiler makes one product of it
    return qkv, projected.weight_q, projected.weight_k, rope


def _shape(projected: Projected) -> tuple[int, float]:
    return projected.num_heads, projected.eps


@dataclass(frozen=True)
class RingFormat:
    """How a stream remembers: `values` None keeps keys and values in `dtype`, else keys are e4m3 and values are e4m3
    ("fp8") or bfloat16 ("mixed")."""

    dtype: torch.dtype = torch.bfloat16
    values: Values | None = None


@dataclass
class StreamMemory:
    """All layers' memories of one condition: rings of every step, and the condition, which the steps share.

    The steps of a block run one after another, so the reference rows, rotated anew by each step, need one buffer.
    """

    layers: list[list[PlainMemory | Fp8Memory]]  # [step][layer]
    reference_ropes: list[Tensor]  # [step], written before the step runs

    @classmethod
    def allocate(
        cls,
        norms: Sequence[tuple[Tensor, Tensor]],
        position: Position,
        *,
        steps: int,
        reference_tokens: int,
        condition_tokens: int,
        block_tokens: int,
        blocks: int,
        num_heads: int,
        ring: RingFormat,
    ) -> "StreamMemory":
        """Zeros for `blocks` blocks a ring. `norms`: (q, k) weights [D] of every layer's attention."""
        device, head_dim = norms[0][0].device, norms[0][0].numel() // num_heads
        ropes = [torch.zeros(reference_tokens, head_dim // 2, 2, device=device) for _ in range(steps)]
        layers: list[list[PlainMemory | Fp8Memory]] = [[] for _ in range(steps)]
        for weight_q, weight_k in norms:
            reference = torch.zeros(1, reference_tokens, num_heads, head_dim, dtype=ring.dtype, device=device)
            if ring.values is None:
                sizes = (1, condition_tokens, blocks * block_tokens, num_heads, head_dim)
                for step, rope in enumerate(ropes):
                    cache = JoinedCache.allocate(*sizes, dtype=ring.dtype, device=device)
                    layers[step].append(PlainMemory(cache, reference, rope, position))
                continue
            scale_q, scale_k = static_scales(weight_q, num_heads), static_scales(weight_k, num_heads)
            shape = (num_heads, head_dim, ring.values)
            condition = Fp8Segment.allocate(1, 1, condition_tokens, *shape, device=device)
            for step, rope in enumerate(ropes):
                own = Fp8Segment.allocate(1, blocks, block_tokens, *shape, device=device)
                scales = (scale_q, scale_k, 1.0 / (scale_q * scale_k))
                layers[step].append(Fp8Memory(own, condition, reference, rope, position, *scales))
        return cls(layers, ropes)

    def store_condition(self, condition: ConditionCache) -> None:
        """Take in a prefill's keys and values, rotated with the reference where an unshifted stream has it."""
        rope = condition.rope(0)
        for step in self.layers:
            for memory, layer in zip(step, condition.layers, strict=True):
                _store(memory, layer, rope)


def _store(memory: PlainMemory | Fp8Memory, layer: KeyValue, rope: Tensor) -> None:
    memory.reference.copy_(layer.k[:, : memory.reference.shape[1]])
    if isinstance(memory, PlainMemory):
        k, v = memory.cache.condition
        rotate_rows_into(layer.k, rope, k)
        v.copy_(layer.v)
    else:
        memory.condition.store_condition(layer.k, layer.v, rope, memory.scale_k)
