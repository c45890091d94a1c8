"""All denoising steps of a block on one GPU as one CUDA graph, rewritten onto the fused ops; the condition as another.

The drop-in for `SingleDevice` where speed counts. One graph serves the growing and the rolling cache: the block's
number and the reference distances are tensors on the device, and everything that follows from them (ring rows, rotary
tables) is computed inside the graph.
"""

import torch
from torch import Tensor

from ...graphs.models.liveavatar_memory import Position
from ...graphs.rewrite.program import Prepared, Program
from ..samplers import euler_step
from ..systems.liveavatar_step import BlockInputs
from .static_stream import StaticStream


class CapturedBlock(StaticStream):
    """LiveAvatar's steps one after another over static memories; every block is finished when `denoise` returns."""

    batch = 1
    times: list[Prepared]  # the noise level of each step
    memories: list[Prepared]  # likewise

    @torch.no_grad()
    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor:
        """Latents [1, 16, block latents, h, w] at the first step's noise level -> after the last step."""
        self._check_conditioned()
        self.static.fill(x, block)
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
