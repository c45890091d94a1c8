"""The time-steps of consecutive blocks batched into one forward, on one GPU with power to spare.

Step k of a block attends only what step k of earlier blocks wrote, so the steps of blocks n, n-1, n-2, ... are
independent of each other: what the time-step pipeline spreads over ranks (liveavatar.md, 5.1) is here a batch. Products
multiply as many tokens at once as there are steps; each sample attends its own ring at its own place. Latents are those
of the steps one after another; a block comes out as many ticks after it went in as there are steps, less one.
"""

import torch
from torch import Tensor

from ...graphs.models.liveavatar_memory import BatchedMemory, Position
from ...graphs.rewrite.program import Prepared, Program
from ..samplers import euler_step
from ..systems.liveavatar_step import BlockInputs
from .static_stream import StaticStream


class BatchedSteps(StaticStream):
    """One graph a tick: sample k takes step k of the block that entered k ticks ago.

    Every step has a condition of its own, because a new one reaches the steps one tick after another: in slots three
    times the condition (3.3 GB of e4m3 at 14B, 704x384) more than `CapturedBlock` takes, and its reference rows. A step
    that no block has reached, or that the last one has left (`drain`), computes what is never attended: it writes where
    its next block writes before it reads. A tick that fails changes nothing: the same call may be made again.
    """

    own_conditions = True
    time: Prepared
    memories: Prepared

    @property
    def batch(self) -> int:
        return self.mode.steps

    def _forget(self) -> None:
        super()._forget()
        self.newest: BlockInputs | None = None  # that has entered
        self.on_their_way: list[BlockInputs | None] = [None] * (self.batch - 1)  # newest first; None: a gap
        self.reached: list[int] = []  # the last step that each condition has reached, unless all; oldest first
        self.drained: list[Tensor] = []  # by a `drain` that did not end
        self.static.x.zero_()  # samples that no block has reached must be finite

    @torch.no_grad()
    def condition(self, reference: Tensor, motion: Tensor) -> None:
        """As `StaticStream.condition`; blocks on their way keep the condition under which they entered."""
        super().condition(reference, motion)
        if self.batch > 1 and 0 not in self.reached:
            self.reached.append(0)

    @torch.no_grad()
    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor | None:
        """Noise [1, 16, block latents, h, w] of the next block in -> the latents of the block that has finished, None
        while the first ones are on their way. Blocks must follow each other; ValueError otherwise."""
        self._check_conditioned()
        last = self.newest
        if last is not None and block.index != last.index + 1:
            raise ValueError(f"block {block.index} cannot follow block {last.index}; begin a new stream")
        if any(other is not None and other.actor_mask is not block.actor_mask for other in self.on_their_way):
            raise ValueError("this block has another actor mask than those on their way; drain() them first")
        self.static.fill(x, block)
        return self._tick(block)

    @torch.no_grad()
    def drain(self) -> list[Tensor]:
        """The latents of the blocks that are still on their way, oldest first; further blocks may follow."""
        while any(block is not None for block in self.on_their_way):
            made = self._tick(None)
            if made is not None:
                self.drained.append(made)
        found, self.drained = self.drained, []
        return found

    def _tick(self, entered: BlockInputs | None) -> Tensor | None:
        """Every step once -> the latents of the block that has taken its last one."""
        by_step, newest = [entered, *self.on_their_way], entered or self.newest
        assert newest is not None
        self._find_places(by_step, newest.index + 1)
        self.compile()
        self.replay()
        made = self.static.out[-1:].clone()
        self.static.move_on()
        self._hand_on_conditions()
        self.newest = newest
        *self.on_their_way, finished = by_step
        return None if finished is None else made

    def _find_places(self, by_step: list[BlockInputs | None], number: int) -> None:
        """Number and reference distance of the block at each step; a gap stands where its step's next block will, the
        first one where block `number` will."""
        distances = [0] * self.batch
        for step, block in enumerate(by_step):
            if block is not None:
                number, distances[step] = block.index, block.distances[step]
            self.static.block[step].fill_(number)
        self.static.distances.copy_(torch.tensor(distances))

    def _hand_on_conditions(self) -> None:
        """A condition reaches step k together with the first block that entered under it: here, for the next tick."""
        for step in self.reached:
            self.memory.hand_on(step)
        self.reached = [step + 1 for step in self.reached if step + 2 < self.batch]

    def _places(self) -> list[Position]:
        return [Position.zero(self.dit.device) for _ in range(self.batch)]

    def _by_layer(self) -> list[BatchedMemory]:
        return [BatchedMemory(list(samples)) for samples in zip(*self.memory.layers, strict=True)]

    def _trace(self) -> Program:
        rope = self.dit.noisy_rope(self.static.block * self.frames, self.frames, self.grid)  # [B, L, d/2, 2]
        return self._trace_with(self.timesteps, self._by_layer(), rope)

    def _prepare(self, program: Program) -> None:
        self.time = program.prepare("time", self.dit.embed_time(self.timesteps[:, None]))
        self.memories = program.prepare("memories", self._by_layer())

    def _run(self) -> None:
        dit, static, program = self.dit, self.static, self.program
        assert program is not None
        for step, position in enumerate(self.positions):
            block = static.block[step : step + 1]
            self._place(position, block)
            self._move_reference(step, block[0] * self.frames)
        flow = program(
            x=static.x,
            time=self.time,
            text=self.text_inputs,
            audio=program.prepare("audio", dit.encode_audio(static.audio.flatten(0, 1))),
            memories=self.memories,
            rope=dit.noisy_rope(static.block * self.frames, self.frames, self.grid),
            cond_states=static.pose,
            mask=static.mask,
        )
        sigma, sigma_next = (s.view(-1, 1, 1, 1, 1) for s in (self.sigmas[:-1], self.sigmas[1:]))
        static.out.copy_(euler_step(static.x, flow, sigma, sigma_next))
