"""LiveAvatar's passes as programs: the denoising step over static memories, and the prefill of the condition."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.attention_fp8 import Fp8Segment
from ...kernels.kv_cache import JoinedCache
from ..models.liveavatar import AudioState, LiveAvatar, Text, TextState, TimeState
from ..models.liveavatar_cache import KeyValue, Memory
from ..models.liveavatar_memory import (
    BatchedMemory,
    Fp8Memory,
    JoinedFp8Memory,
    LayerMemory,
    PlainMemory,
    Position,
    store_condition,
)
from ..models.liveavatar_text import Fp8Context, Fp8TextState
from .program import Argument, Program, trace

for _node in (
    TimeState,
    TextState,
    Fp8Context,
    Fp8TextState,
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
    text: Text,
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


def trace_prefill(
    dit: LiveAvatar,
    x: Tensor,
    still: TimeState,
    text: Text,
    rope: Tensor,
    memories: Sequence[Sequence[LayerMemory]],
) -> Program:
    """`dit.prefill_tokens` of these arguments (or others of their shapes), stored into the memories, as a program.

    `memories`: of every layer, those that `StreamMemory.receiving` tells. What the last layer makes of its tokens
    beyond its keys and values has no reader and is left out.
    """

    def prefill(
        x: Tensor, still: TimeState, text: Text, rope: Tensor, memories: Sequence[Sequence[LayerMemory]]
    ) -> tuple[()]:
        def store(layer: int, kept: KeyValue, rope: Tensor) -> None:
            store_condition(memories[layer], kept, rope)

        dit.prefill_tokens(x, still, text, rope, store)
        return ()

    return trace(
        prefill,
        {
            "x": Argument(x, "step"),
            "still": Argument(still, "schedule"),
            "text": Argument(text, "prompt"),
            "rope": Argument(rope, "prompt"),
            "memories": Argument([list(layer) for layer in memories], "step"),
        },
        dit,
    )
