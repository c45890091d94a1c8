"""Memories of a stream in static buffers: what a captured CUDA graph writes and reads at every block.

Where a block stands is on the device (`Position`), so that one graph serves the growing and the rolling ring. The
condition keys lie rotated beside the ring; only the reference's rows move with the stream and are rotated anew for each
step. Three formats: bfloat16 (or float32); e4m3 keys with e4m3 or bfloat16 values in slots; both e4m3 in one buffer.

Legend: S ring rows, C condition tokens, P tokens of a frame (the reference), L tokens of a block, H heads, d head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.attention_fp8 import Fp8Segment, Values, attention_fp8
from ...kernels.attention_joined import ROWS_AT, attention_joined, joined_scales
from ...kernels.kv_cache import (
    E4M3,
    JoinedCache,
    qkv_norm_rope,
    qkv_norm_rope_fp8,
    rotate_rows_into,
    static_scales,
)
from ...kernels.qk_rows import Slots
from .liveavatar_cache import KeyValue, Projected


@dataclass(frozen=True)
class Position:
    """Int32 [1] on the device: ring row where the block is written; rows that are valid once it is, in the ring and
    with the condition before it."""

    write: Tensor
    length: Tensor
    keys: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> "Position":
        return cls(*(torch.zeros(1, dtype=torch.int32, device=device) for _ in range(3)))

    @classmethod
    def of(cls, block: Tensor, tokens: int, capacity: int, condition_tokens: int) -> "Position":
        """For block number `block` (int64 [1]) of `tokens` tokens in a ring of `capacity` rows; no host read.

        Before block 0 nothing is valid; what is written there lies where a later block comes before it is attended.
        """
        slots = capacity // tokens
        write = (block % slots) * tokens
        length = (block + 1).clamp(0, slots) * tokens
        return cls(write.int(), length.int(), (condition_tokens + length).int())

    def move(self, other: "Position") -> None:
        for own, new in ((self.write, other.write), (self.length, other.length), (self.keys, other.keys)):
            own.copy_(new)


class _FromOneTensor(ABC):
    """A `Memory` that takes q, k and v in one tensor."""

    def attend(self, projected: Projected, rope: Tensor) -> Tensor:
        return self.attend_joined(_joined(projected), projected, rope)

    @abstractmethod
    def attend_joined(self, qkv: Tensor, by: Projected, rope: Tensor) -> Tensor:
        """`attend` for q, k and v in one tensor [B, L, 3D]; `by` says how they are normed."""


@dataclass(frozen=True)
class PlainMemory(_FromOneTensor):
    """One layer's keys and values, condition and ring in one buffer; `reference` [B, P, H, d]: its keys not rotated."""

    cache: JoinedCache
    reference: Tensor
    reference_rope: Tensor
    position: Position

    def attend_joined(self, qkv: Tensor, by: Projected, rope: Tensor) -> Tensor:
        ring_k, ring_v = self.cache.ring
        rotate_rows_into(self.reference, self.reference_rope, self.cache.condition[0])
        norms = by.weight_q, by.weight_k, rope
        q = qkv_norm_rope(qkv, *norms, ring_k, ring_v, self.position.write, by.num_heads, by.eps)
        return ops.rope_attention(q, [self.cache.k], [self.cache.v], lengths=[self.position.keys])

    def store_condition(self, k: Tensor, v: Tensor, rope: Tensor) -> None:
        """Keys before rotation and values [1, C, H, d], and the rotary table of the condition [C, d/2, 2]."""
        kept_k, kept_v = self.cache.condition
        rotate_rows_into(k, rope, kept_k)
        kept_v.copy_(v)

    def of_condition(self) -> list[Tensor]:
        """Everything that follows from the condition."""
        return [*self.cache.condition, self.reference]

    def clear(self) -> None:
        """Forget: what an earlier stream left could hold NaN, which a masked row would still hand on."""
        for ring in self.cache.ring:
            ring.zero_()


@dataclass(frozen=True)
class Fp8Memory(_FromOneTensor):
    """The same in e4m3; scales float32 [H] of queries and keys follow from the norms' weights (`static_scales`)."""

    ring: Fp8Segment
    condition: Fp8Segment
    reference: Tensor
    reference_rope: Tensor
    position: Position
    scale_q: Tensor
    scale_k: Tensor
    qk_descale: Tensor

    def attend_joined(self, qkv: Tensor, by: Projected, rope: Tensor) -> Tensor:
        ring, mixed = self.ring, self.ring.v_descale is None
        self.condition.rotate_keys(self.reference, self.reference_rope, self.scale_k)
        q = qkv_norm_rope_fp8(
            qkv,
            by.weight_q,
            by.weight_k,
            rope,
            ring.k8,
            ring.v if mixed else None,
            self.position.write,
            self.scale_q,
            self.scale_k,
            ring.slots,
            by.num_heads,
            by.eps,
        )
        if not mixed:
            ring.store_values(by.heads(qkv.chunk(3, -1)[2]), self.position.write)
        return attention_fp8(q, [self.condition, ring.with_length(self.position.length)], self.qk_descale)

    def store_condition(self, k: Tensor, v: Tensor, rope: Tensor) -> None:
        """As `PlainMemory.store_condition`."""
        self.condition.store_condition(k, v, rope, self.scale_k)

    def of_condition(self) -> list[Tensor]:
        """As `PlainMemory.of_condition`."""
        kept = [self.condition.k8, self.condition.v, self.reference]
        return kept if self.condition.v_descale is None else [*kept, self.condition.v_descale]

    def clear(self) -> None:
        """Forget, as `PlainMemory.clear`; of the keys nothing beyond the valid rows counts."""
        self.ring.v.zero_()
        if self.ring.v_descale is not None:
            self.ring.v_descale.fill_(1)


HEADROOM = 8.0
"""How much larger than any value of the condition a value of the stream may be before it saturates."""


@dataclass(frozen=True)
class JoinedFp8Memory(_FromOneTensor):
    """The same in one buffer with one scale a tensor, which cuDNN reads; the values' scale follows from the condition.

    `scale_*` float32 [H], each of equal numbers; `scales` as `joined_scales` makes them for the rows of a block, zeros
    until there is a condition.
    """

    cache: JoinedCache
    reference: Tensor
    reference_rope: Tensor
    position: Position
    scale_q: Tensor
    scale_k: Tensor
    scale_v: Tensor
    scales: Tensor

    def attend_joined(self, qkv: Tensor, by: Projected, rope: Tensor) -> Tensor:
        ring_k, ring_v = self.cache.ring
        rotate_rows_into(self.reference, self.reference_rope, self.cache.condition[0], self.scale_k)
        rows = ring_k.shape[1]
        q8 = qkv_norm_rope_fp8(
            qkv,
            by.weight_q,
            by.weight_k,
            rope,
            ring_k,
            ring_v,
            self.position.write,
            self.scale_q,
            self.scale_k,
            Slots(1, rows, rows),
            by.num_heads,
            by.eps,
            self.scale_v,
        )
        return attention_joined(q8, self.cache.k, self.cache.v, self.position.keys, self.scales)

    def store_condition(self, k: Tensor, v: Tensor, rope: Tensor) -> None:
        """Keys before rotation and values [1, C, H, d]; a stream's first condition sets the scale of its values."""
        kept_k, kept_v = self.cache.condition
        rotate_rows_into(k, rope, kept_k, self.scale_k)
        largest = torch.linalg.vector_norm(v, float("inf")).float()  # one reading of v
        fresh = torch.where(largest > 0, 448.0 / (HEADROOM * largest.clamp(min=1e-12)), 1.0)  # blank: any scale will do
        self.scale_v.copy_(torch.where(self.scales[2] == 0, fresh, self.scale_v))
        # a weighted mean of values is no larger than they are, and mostly much smaller
        one = self.scale_v[:1]
        rows = self.scales.numel() - ROWS_AT
        self.scales.copy_(joined_scales(self.scale_q[:1], self.scale_k[:1], one, one * (HEADROOM / 4), rows))
        rotate_rows_into(v, None, kept_v, self.scale_v)

    def of_condition(self) -> list[Tensor]:
        """As `PlainMemory.of_condition`; the scales that the stream's first one set are part of it."""
        return [*self.cache.condition, self.reference, self.scale_v, self.scales]

    def clear(self) -> None:
        for ring in self.cache.ring:
            ring.zero_()
        self.scales.zero_()


LayerMemory = PlainMemory | Fp8Memory | JoinedFp8Memory


@dataclass(frozen=True)
class BatchedMemory:
    """One layer's memories of several samples of a batch, each with its own ring, condition and place in its stream."""

    samples: list[LayerMemory]

    def attend(self, projected: Projected, rope: Tensor) -> Tensor:
        """Sample by sample: projected [B, L, D] each, rope [B, L, d/2, 2] -> [B, L, H, d]."""
        qkv = _joined(projected)
        return torch.cat(
            [memory.attend_joined(qkv[i : i + 1], projected, rope[i]) for i, memory in enumerate(self.samples)]
        )


def _joined(projected: Projected) -> Tensor:
    return torch.cat((projected.q, projected.k, projected.v), -1)  # the compiler makes one product of it


@dataclass(frozen=True)
class RingFormat:
    """How a stream remembers: `values` None keeps keys and values in `dtype`, else keys are e4m3 and values are e4m3 in
    slots ("fp8"), bfloat16 ("mixed"), or e4m3 with the condition in one buffer, for cuDNN ("joined"; then those of the
    prompt are e4m3 too, see `liveavatar_text`)."""

    dtype: torch.dtype = torch.bfloat16
    values: Values | Literal["joined"] | None = None


@dataclass
class StreamMemory:
    """All layers' memories of one stream: rings of every step, and the condition.

    The steps of a block run one after another, so the reference rows, rotated anew by each step, need one
    buffer, unless each step has its own condition.
    """

    layers: list[list[LayerMemory]]  # [step][layer]
    reference_ropes: list[Tensor]  # [step], written before the step runs
    own_conditions: bool = False  # each step keeps the condition for itself

    @classmethod
    def allocate(
        cls,
        norms: Sequence[tuple[Tensor, Tensor]],
        positions: Sequence[Position],
        *,
        reference_tokens: int,
        condition_tokens: int,
        block_tokens: int,
        blocks: int,
        num_heads: int,
        ring: RingFormat,
        own_conditions: bool = False,
    ) -> "StreamMemory":
        """Zeros for `blocks` blocks a ring. `norms`: (q, k) weights [D] of every layer's attention; `positions`: of
        every step. `own_conditions`: each step keeps the condition for itself, so that it can change step by step."""
        device, head_dim = norms[0][0].device, norms[0][0].numel() // num_heads
        ropes = [torch.zeros(reference_tokens, head_dim // 2, 2, device=device) for _ in positions]
        places = list(zip(ropes, positions, strict=True))
        layers: list[list[LayerMemory]] = [[] for _ in positions]
        sizes = (1, condition_tokens, blocks * block_tokens, num_heads, head_dim)

        def kept() -> Tensor:
            return torch.zeros(1, reference_tokens, num_heads, head_dim, dtype=ring.dtype, device=device)

        for weight_q, weight_k in norms:
            shared = None if own_conditions else kept()
            if ring.values is None:
                for step, place in enumerate(places):
                    cache = JoinedCache.allocate(*sizes, dtype=ring.dtype, device=device)
                    layers[step].append(PlainMemory(cache, kept() if shared is None else shared, *place))
                continue
            if ring.values == "joined":
                one_q, one_k = (static_scales(w, 1).expand(num_heads).contiguous() for w in (weight_q, weight_k))
                rest: list[Tensor] = []
                for step, place in enumerate(places):
                    cache = JoinedCache.allocate(*sizes, dtype=E4M3, device=device)
                    if not rest or own_conditions:
                        # scale_v, scales
                        rest = [torch.zeros(n, device=device) for n in (num_heads, ROWS_AT + block_tokens)]
                    reference = kept() if shared is None else shared
                    layers[step].append(JoinedFp8Memory(cache, reference, *place, one_q, one_k, *rest))
                continue
            scale_q, scale_k = static_scales(weight_q, num_heads), static_scales(weight_k, num_heads)
            scales = (scale_q, scale_k, 1.0 / (scale_q * scale_k))
            shape = (num_heads, head_dim, ring.values)
            condition: Fp8Segment | None = None
            for step, place in enumerate(places):
                if condition is None or own_conditions:
                    condition = Fp8Segment.allocate(1, 1, condition_tokens, *shape, device=device)
                own = Fp8Segment.allocate(1, blocks, block_tokens, *shape, device=device)
                reference = kept() if shared is None else shared
                layers[step].append(Fp8Memory(own, condition, reference, *place, *scales))
        return cls(layers, ropes, own_conditions)

    def receiving(self, layer: int) -> list[LayerMemory]:
        """The memories of a layer to which `store_condition` hands a condition."""
        memories = [step[layer] for step in self.layers]
        first_only = self.own_conditions or isinstance(memories[0], Fp8Memory)  # there the condition is one segment
        return memories[:1] if first_only else memories

    def hand_on(self, step: int) -> None:
        """Give the condition of a step, where each has its own, to the next one too."""
        if not self.own_conditions:
            raise ValueError("all steps of this memory share one condition; allocate it with own_conditions")
        for memory, after in zip(self.layers[step], self.layers[step + 1], strict=True):
            for made, own in zip(memory.of_condition(), after.of_condition(), strict=True):
                own.copy_(made)

    def clear(self) -> None:
        """Forget all blocks, for a new stream."""
        for memories in self.layers:
            for memory in memories:
                memory.clear()


def store_condition(memories: Sequence[LayerMemory], kept: KeyValue, rope: Tensor) -> None:
    """Take in a layer's condition (`StreamMemory.store`) where `memories` share the reference rows and all scales: the
    first rotates and rounds, the others copy."""
    first, *others = memories
    first.reference.copy_(kept.k[:, : first.reference.shape[1]])
    first.store_condition(kept.k, kept.v, rope)
    for other in others:
        if isinstance(first, Fp8Memory) or isinstance(other, Fp8Memory):
            raise ValueError("steps with FP8 slots share one condition segment; pass the memory of one step")
        for own, made in zip(other.cache.condition, first.cache.condition, strict=True):
            own.copy_(made)
