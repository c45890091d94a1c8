"""All denoising steps of a block on one GPU as one CUDA graph, rewritten onto the fused ops; the condition as another.

The drop-in for `SingleDevice` where speed counts. One graph serves the growing and the rolling cache: the block's
number and the reference distances are tensors on the device, and everything that follows from them (ring rows, rotary
tables) is computed inside the graph.
"""

import torch
from torch import Tensor

from ...graphs.capture import Pool
from ...graphs.models.liveavatar import LiveAvatar
from ...graphs.models.liveavatar_memory import Position, RingFormat
from ...graphs.rewrite.program import Prepared, Program
from ...graphs.rewrite.recipe import Recipe
from ..samplers import euler_step
from ..systems.liveavatar_mode import GenerationMode
from ..systems.liveavatar_step import BlockInputs
from .captured_prefill import CapturedPrefill
from .static_stream import DEFAULT, BlockShape, StaticStream


class CapturedBlock(StaticStream):
    """LiveAvatar's steps over static memories; the arguments of `SingleDevice`, then those of `StaticStream`.

    On a CPU the same program runs call by call.
    """

    conditioned = False
    times: list[Prepared]  # the noise level of each step
    memories: list[Prepared]  # likewise

    def __init__(
        self,
        dit: LiveAvatar,
        context: Tensor,
        mode: GenerationMode,
        grid: tuple[int, int],
        recipe: Recipe = DEFAULT,
        ring: RingFormat | None = None,
        shape: BlockShape | None = None,
        pool: Pool | None = None,
    ):
        super().__init__(dit, context, mode, grid, recipe, ring, shape, pool)
        self.prefill = CapturedPrefill(dit, self.text, self.memory, grid, recipe, self.packed, pool)

    def begin(self, context: Tensor) -> None:
        super().begin(context)
        self.conditioned = False

    @torch.no_grad()
    def record(self) -> None:
        super().record()  # first: it takes the most of the working memory that both share
        self.prefill.record()
        self.memory.clear()  # the warm-up's condition has set scales
        self.conditioned = False

    @torch.no_grad()
    def condition(self, reference: Tensor, motion: Tensor) -> None:
        """Replace the condition: reference latent [1, 16, 1, h, w], motion latents [1, 16, T, h, w].

        ValueError for latents of another size than the stream's.
        """
        self.prefill(reference, motion)
        self.conditioned = True

    @torch.no_grad()
    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor:
        """Latents [1, 16, block latents, h, w] at the first step's noise level -> after the last step."""
        if not self.conditioned:
            raise RuntimeError("there is no condition yet; call condition() before the first block")
        self.static.fill(0, x, block)
        self.static.distances.copy_(torch.tensor(block.distances))
        self.compile()
        self.replay()
        return self.static.out.clone()

    def _places(self) -> list[Position]:
        return [Position.zero(self.dit.device)] * self.mode.steps  # they all write the same block

    def _trace(self) -> Program:
        rope = self.dit.noisy_rope(0, self.frames, self.grid)
        return self._trace_with(self.timesteps[:1], self.memory.layers[0], rope)

    def _prepare(self, program: Program) -> None:
        self.times = [program.prepare("time", self.dit.embed_time(t.view(1, 1))) for t in self.timesteps]
        self.memories = [program.prepare("memories", layers) for layers in self.memory.layers]

    def _run(self) -> None:
        dit, static, program = self.dit, self.static, self.program
        assert program is not None
        self._place(self.positions[0], static.block)
        first = static.block[0] * self.frames
        rope = dit.noisy_rope(first, self.frames, self.grid)
        audio = program.prepare("audio", dit.encode_audio(static.audio.flatten(0, 1)))
        x = static.x
        for step, time in enumerate(self.times):
            self._move_reference(step, first)
            flow = program(
                x=x,
                time=time,
                text=self.text_inputs,
                audio=audio,
                memories=self.memories[step],
                rope=rope,
                cond_states=static.pose,
                mask=static.mask,
            )
            x = euler_step(x, flow, self.sigmas[step], self.sigmas[step + 1])
        static.out.copy_(x)
