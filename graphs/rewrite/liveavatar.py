"""LiveAvatar's passes as programs: the denoising step over static memories, and the prefill of the condition."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.attention_fp8 import Fp8Segment
from ...kernels.kv_cache import JoinedCache
from ..models.liveavatar import AudioState, LiveAvatar, TextState, TimeState
from ..models.liveavatar_cache import Memory
from ..models.liveavatar_memory import BatchedMemory, Fp8Memory, JoinedFp8Memory, PlainMemory, Position
from .program import Argument, Program, trace

for _node in (
    TimeState,
    TextState,
    AudioState,
    Position,
    JoinedCache,
    Fp8Segment,
    PlainMemory,
    Fp8Memory,
    JoinedFp8Memory,
    BatchedMemory,
):
    torch.export.register_dataclass(_node)


def trace_step(
    dit: LiveAvatar,
    x: Tensor,
    time: TimeState,
    text: TextState,
    audio: AudioState,
    memories: Sequence[Memory],
    rope: Tensor,
    cond_states: Tensor | None = None,
    mask: Tensor | None = None,
) -> Program:
    """`dit.stream_block` of these arguments (or others of their shapes) as a program."""

    def step(**arguments: Any) -> Tensor:
        return dit.stream_block(**arguments)

    return trace(
        step,
        {
            "x": Argument(x, "step"),
            "time": Argument(time, "schedule"),
            "text": Argument(text, "prompt"),
            "audio": Argument(audio, "block"),
            "memories": Argument(list(memories), "step"),
            "rope": Argument(rope, "block"),
            "cond_states": Argument(cond_states, "block"),
            "mask": Argument(mask, "prompt"),
        },
        dit,
    )
