"""The prefill of a stream's condition as one CUDA graph, rewritten onto the fused ops, written into static memories.

It runs when a stream opens and once more in the middle of it (the re-sink), where launch by launch it would make a
block late. Weights, joined or quantised, are those of the step's program; working memory is that of its graph.
"""

import torch
from torch import Tensor

from ...graphs.capture import Pool, Replay
from ...graphs.models.liveavatar import LiveAvatar, Text
from ...graphs.models.liveavatar_cache import condition_table
from ...graphs.models.liveavatar_memory import StreamMemory
from ...graphs.rewrite.liveavatar import trace_prefill
from ...graphs.rewrite.program import Prepared, Program
from ...graphs.rewrite.recipe import Recipe, apply


class CapturedPrefill:
    """`LiveAvatar.prefill_layers` from static latents into the memories of all steps that share the condition, or of
    the first step where each has its own (`StreamMemory.receiving`).

    `grid`: latent (rows, columns); `text`: the prompt's keys and values, read where they lie; `packed`: quantised
    weights by name, shared with other programs of the model (`rewrite.recipe.apply`). On a CPU the program runs call by
    call.
    """

    def __init__(
        self,
        dit: LiveAvatar,
        text: Text,
        memory: StreamMemory,
        grid: tuple[int, int],
        recipe: Recipe,
        packed: dict[str, tuple[Tensor, Tensor]],
        pool: Pool | None = None,
    ):
        config, patches = dit.config, (grid[0] // 2, grid[1] // 2)
        self.dit, self.text, self.memory, self.recipe, self.packed = dit, text, memory, recipe, packed
        self.reference, self.motion = (
            torch.zeros(1, config.in_dim, frames, *grid, dtype=dit.dtype, device=dit.device)
            for frames in (1, sum(config.motion_buckets))
        )
        self.rope = condition_table(dit.motion_rope(patches), 0, patches, config.rope_dtype)  # [C, d/2, 2]
        self.program: Program | None = None
        self.still = self.text_inputs = self.memories = Prepared([])
        self.replay = Replay(self._run, dit.device, pool)

    @torch.no_grad()
    def __call__(self, reference: Tensor, motion: Tensor) -> None:
        """Reference latent [1, 16, 1, h, w] and motion latents [1, 16, T, h, w], of which the last 19 count."""
        self._fill(reference, motion)
        self.compile()
        self.replay()

    def _fill(self, reference: Tensor, motion: Tensor) -> None:
        """Take in latents; missing motion latents are zero, as `FramePacker` has it. ValueError for another size."""
        one, frames = self.reference.shape, self.motion.shape[2]
        if reference.shape != one or (*motion.shape[:2], 1, *motion.shape[3:]) != tuple(one):
            raise ValueError(
                f"this condition has a reference {tuple(reference.shape)} and motion latents {tuple(motion.shape)}, "
                f"the stream was made for {tuple(one)} and any number of such frames; open a new stream"
            )
        kept = motion[:, :, -frames:]
        missing = frames - kept.shape[2]
        self.reference.copy_(reference)
        self.motion[:, :, :missing].zero_()
        self.motion[:, :, missing:].copy_(kept)

    @torch.no_grad()
    def compile(self) -> Program:
        """The rewritten prefill with its reports, without running it; works on the meta device too."""
        if self.program is None:
            dit = self.dit
            memories = [self.memory.receiving(layer) for layer in range(len(dit.layers))]
            still = dit.embed_time(torch.zeros(1, 1, device=dit.device))
            tokens = self._tokens()
            self.program = apply(
                trace_prefill(dit, tokens, still, self.text, self.rope, memories), self.recipe, self.packed
            )
            self.still = self.program.prepare("still", still)
            self.text_inputs = self.program.prepare("text", self.text)
            self.memories = self.program.prepare("memories", memories)
        return self.program

    def record(self) -> None:
        """Compile, and on a GPU record the graph; the condition is lost, and with it the scales that follow from it."""
        self.compile()
        self.replay.record()

    def _tokens(self) -> Tensor:
        """[1, C, D]; outside of the program, whose passes have nothing to do in it."""
        return self.dit.join_condition(*self.dit.embed_condition(self.reference, self.motion))

    def _run(self) -> None:
        assert self.program is not None
        self.program(x=self._tokens(), still=self.still, text=self.text_inputs, rope=self.rope, memories=self.memories)
