"""A layer's memory as an exported step sees it: every tensor is an argument, and only the ring is written.

A program in another language owns the tensors, so nothing is shared between views here: the condition's keys come as
`LiveAvatar.prefill` made them and are rotated in each step, and the ring is a tensor of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.kv_cache import qkv_norm_rope
from .models.liveavatar_cache import KeyValue, Projected
from .models.liveavatar_memory import Position


@dataclass(frozen=True)
class ArgumentMemory:
    """Ring [B, S, H, d], condition [B, C, H, d] with keys before rotation, and its rotary table [C, d/2, 2]."""

    ring: KeyValue
    condition: KeyValue
    condition_rope: Tensor
    position: Position

    def attend(self, projected: Projected, rope: Tensor) -> Tensor:
        """Write the block's rotated keys and its values to the ring, then attend condition and ring; [B, L, H, d]."""
        p = projected
        qkv = torch.cat((p.q, p.k, p.v), -1)  # the compiler makes one product of it
        q = qkv_norm_rope(
            qkv, p.weight_q, p.weight_k, rope, *self.ring, self.position.write, p.num_heads, p.eps
        )  # [B, L, H, d]
        return ops.rope_attention(
            q,
            [self.condition.k, self.ring.k],
            [self.condition.v, self.ring.v],
            ropes=[self.condition_rope, None],
            lengths=[None, self.position.length],
        )
