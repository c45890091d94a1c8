"""What LiveAvatar remembers: a rolling cache of the past per denoising step, and the condition tokens shared by all.

Legend: S ring rows, C condition tokens, H heads, d head size (liveavatar.md, 2.6).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...kernels import ops
from .liveavatar_config import LiveAvatarConfig
from .liveavatar_rope import REFERENCE_FRAME, frame_table


class Context(Protocol):
    """One layer's keys and values of a cross attention, prepared once and attended by many.

    `KeyValue` is the plain one; `liveavatar_text` has that in e4m3.
    """

    def attend(self, q: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Queries [B, Lq, D] as they leave their projection, the weight [D] of their norm -> [B, Lq, D]."""
        ...


class KeyValue(NamedTuple):
    """Keys and values [B, L, H, d] of one layer."""

    k: Tensor
    v: Tensor

    def attend(self, q: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `Context.attend`; keys of batch 1 are shared by all samples."""
        k, v = (part.expand(q.shape[0], -1, -1, -1) for part in self)
        queries = ops.head_norm(q, weight, k.shape[2], eps=eps)
        return ops.rope_attention(queries, [k], [v]).flatten(2)


@dataclass(frozen=True)
class RingSlot:
    """Rows of the ring: the block is written from `write` on, rows [first, end) are attended."""

    write: int
    first: int
    end: int


def ring_slot(start: int, length: int, capacity: int, window: int | None = None) -> RingSlot:
    """Where `length` tokens at absolute offset `start` go in a ring of `capacity` rows, and what they attend.

    Until the ring is full the rows [0, start + length) are attended, afterwards all of them. `window` limits them to
    the last rows before the wrap. Errors: a block that crosses the end of the ring; a window after the wrap.
    """
    write = start % capacity
    if write + length > capacity:
        raise ValueError(
            f"{length} tokens at offset {start} cross the end of a ring of {capacity}; "
            "start blocks at multiples of their length and make the ring a multiple of it"
        )
    if start >= capacity:
        if window is not None:
            raise ValueError(f"local_attn_size works only before the ring of {capacity} tokens wraps; use -1")
        return RingSlot(write, 0, capacity)
    end = start + length
    return RingSlot(write, 0 if window is None else max(0, end - window), end)


@dataclass
class RollingCache:
    """Rotated keys and values of the last `frames` latent frames at one noise level, k and v [layers, B, S, H, d].

    One per denoising step; it lives as long as the stream. Rows never written are zero, and are attended when a stream
    starts in the middle of the ring.
    """

    k: Tensor
    v: Tensor
    tokens_per_frame: int

    @classmethod
    def allocate(
        cls,
        config: LiveAvatarConfig,
        tokens_per_frame: int,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "RollingCache":
        """Zeros for `config.cache_frames` frames of (latent height / 2) * (latent width / 2) tokens."""
        rows = config.cache_frames * tokens_per_frame
        shape = (config.num_layers, batch, rows, config.num_heads, config.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(k, v, tokens_per_frame)

    def slot(self, start_frame: int, frames: int, local_attn_size: int = -1) -> RingSlot:
        """The ring rows of a block of `frames` latent frames whose first one is `start_frame`."""
        per_frame = self.tokens_per_frame
        window = None if local_attn_size == -1 else local_attn_size * per_frame
        return ring_slot(start_frame * per_frame, frames * per_frame, self.k.shape[2], window)


@dataclass(frozen=True)
class ConditionCache:
    """Keys before rotation and values of the condition tokens (reference, then packed motion), one entry a layer.

    `motion_rope` [C - H'W', d/2, 2] is their fixed part of the rotary table; the reference moves with the stream.
    """

    layers: tuple[KeyValue, ...]
    grid: tuple[int, int]
    motion_rope: Tensor
    rope_dtype: torch.dtype

    def rope(self, ref_shift: int | Tensor) -> Tensor:
        """Rotary table [C, d/2, 2] with the reference moved `ref_shift` frames into the future."""
        return condition_table(self.motion_rope, ref_shift, self.grid, self.rope_dtype)


def condition_table(
    motion_rope: Tensor, ref_shift: int | Tensor, grid: tuple[int, int], rope_dtype: torch.dtype
) -> Tensor:
    """Reference rows at frame 30 + `ref_shift`, then the motion rows; [C, d/2, 2], with a [B] shift [B, C, d/2, 2]."""
    head_dim = 2 * motion_rope.shape[-2]
    reference = frame_table(REFERENCE_FRAME + ref_shift, 1, grid, head_dim, rope_dtype, motion_rope.device)
    motion = motion_rope.expand(*reference.shape[:-3], *motion_rope.shape)
    return torch.cat((reference, motion), -3)


class Projected(NamedTuple):
    """Queries, keys and values [B, L, D] of a block as they leave their projections, and how they are normed."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight_q: Tensor
    weight_k: Tensor
    num_heads: int
    eps: float

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # [B, L, H, d]


class Memory(Protocol):
    """One layer's past in a streaming call: takes in the block's keys and values and attends all that it holds.

    `LayerMemory` is the plain one; `liveavatar_memory` has those with static buffers and device-side lengths.
    """

    def attend(self, projected: Projected, rope: Tensor) -> Tensor: ...


class LayerMemory(NamedTuple):
    """What one layer attends during a streaming call: its ring [B, S, H, d] and its condition keys, rotated on load."""

    ring: KeyValue
    slot: RingSlot
    condition: KeyValue
    condition_rope: Tensor

    def write(self, k: Tensor, v: Tensor) -> None:
        """Store the rotated keys and the values of the current block over the oldest one."""
        rows = slice(self.slot.write, self.slot.write + k.shape[1])
        self.ring.k[:, rows] = k
        self.ring.v[:, rows] = v

    def active(self) -> KeyValue:
        """The ring rows in sight [B, end - first, H, d]."""
        rows = slice(self.slot.first, self.slot.end)
        return KeyValue(self.ring.k[:, rows], self.ring.v[:, rows])

    def attend(self, projected: "Projected", rope: Tensor) -> Tensor:
        """Write the block's rotated keys to the ring, then attend the ring and the condition tokens; [B, L, H, d]."""
        v = projected.heads(projected.v)
        q, k = ops.qk_norm_rope(
            projected.q, projected.k, projected.weight_q, projected.weight_k, rope, projected.num_heads, projected.eps,
            v.dtype,
        )  # fmt: skip
        self.write(k, v)
        ring = self.active()
        keys, values = [ring.k, self.condition.k], [ring.v, self.condition.v]
        return ops.rope_attention(q, keys, values, ropes=[None, self.condition_rope])
