"""Throughput: the time-steps of consecutive blocks batched into one forward, on one GPU.

Step k of a block attends only what step k of earlier blocks wrote, so the steps of blocks n, n-1, n-2, ... are
independent of each other: what the time-step pipeline spreads over ranks (liveavatar.md, 5.1) is here a batch. Products
multiply as many tokens at once as there are steps; each sample attends its own ring at its own place. Latents are those
of the steps one after another; a block comes out as many ticks after it went in as there are steps, less one.
"""

from collections import deque

import torch
from torch import Tensor

from ...graphs.capture import Pool
from ...graphs.models.liveavatar import ConditionCache, LiveAvatar
from ...graphs.models.liveavatar_memory import BatchedMemory, Position, RingFormat
from ...graphs.rewrite.program import Prepared, Program
from ...graphs.rewrite.recipe import Recipe
from ..samplers import euler_step
from ..systems.liveavatar_mode import GenerationMode
from ..systems.liveavatar_step import BlockInputs
from .static_stream import DEFAULT, BlockShape, StaticStream


class BatchedSteps(StaticStream):
    """One graph a tick: sample k takes step k of the block that entered k ticks ago. Arguments as `CapturedBlock`.

    Every step has a condition of its own, because a new one reaches the steps one tick after another: three times the
    condition (3.3 GB of e4m3 at 14B, 704x384) and its reference rows more than `CapturedBlock` takes.
    """

    own_conditions = True
    time: Prepared
    memories: Prepared

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
        self.batch = mode.steps
        super().__init__(dit, context, mode, grid, recipe, ring, shape, pool)
        self.sigma, self.sigma_next = (s.view(-1, 1, 1, 1, 1) for s in (self.sigmas[:-1], self.sigmas[1:]))
        self._forget()

    def _forget(self) -> None:
        self.entered: deque[BlockInputs] = deque(maxlen=self.batch)  # the newest first
        self.ticks = 0
        self.conditions: deque[tuple[int, ConditionCache]] = deque()  # from which tick of entry on
        self.static.out.zero_()  # what goes on from here to samples that no block has reached must be finite

    def begin(self, context: Tensor) -> None:
        super().begin(context)
        self._forget()

    @torch.no_grad()
    def condition(self, reference: Tensor, motion: Tensor) -> None:
        """Replace the condition for the blocks that enter from now on; latents as `CapturedBlock.condition`."""
        dtype = self.dit.dtype
        cache = self.dit.prefill(reference.to(dtype), motion.to(dtype), self.text)
        self.conditions.append((self.ticks, cache))

    @torch.no_grad()
    def push(self, x: Tensor, block: BlockInputs) -> Tensor | None:
        """Noise [1, 16, block latents, h, w] of the next block in -> the latents of the block that has finished, None
        while the first ones are on their way. Blocks must follow each other; ValueError otherwise."""
        if not self.conditions and not self.ticks:
            raise RuntimeError("there is no condition yet; call condition() before the first block")
        if self.entered and block.index != self.entered[0].index + 1:
            raise ValueError(f"block {block.index} cannot follow block {self.entered[0].index}; begin a new stream")
        if self.entered and block.actor_mask is not self.entered[0].actor_mask:
            raise ValueError("this block has another actor mask than those under way; begin a new stream")
        self.static.x[1:].copy_(self.static.out[:-1])  # before `fill`: one step further each
        self.static.fill(0, x, block)
        for sample in range(1, self.batch):  # those that have not entered yet compute what is never attended
            known = self.entered[sample - 1] if sample <= len(self.entered) else None
            self._carry(sample, known, block.index - sample)
        self.entered.appendleft(block)
        return self._tick()

    @torch.no_grad()
    def drain(self) -> list[Tensor]:
        """The latents of the blocks that are still on their way, oldest first; the stream is over afterwards."""
        last, found = (self.entered[0] if self.entered else None), []
        blank = torch.zeros_like(self.static.x[:1])
        for _ in range(self.batch - 1 if last is not None else 0):
            assert last is not None
            last = BlockInputs(last.index + 1, last.audio, last.distances, last.pose, last.actor_mask)
            made = self.push(blank, last)
            if made is not None:
                found.append(made)
        return found

    def _carry(self, sample: int, block: BlockInputs | None, index: int) -> None:
        """Audio, place and pose of a block that is under way, where its step now is."""
        static = self.static
        static.block[sample].fill_(index)
        if block is not None:
            static.audio[sample].copy_(block.audio)
            if static.pose is not None and block.pose is not None:
                static.pose[sample].copy_(block.pose[0])

    def _tick(self) -> Tensor | None:
        self._hand_on_conditions()
        own = [block.distances[step] for step, block in enumerate(self.entered)]
        self.static.distances.copy_(torch.tensor(own + [0] * (self.batch - len(own))))
        self.compile()
        self.replay()
        self.ticks += 1
        return self.static.out[-1:].clone() if self.ticks >= self.batch else None

    def _hand_on_conditions(self) -> None:
        """A condition reaches step k together with the first block that entered under it."""
        for entered, cache in list(self.conditions):
            step = self.ticks - entered
            rope = cache.rope(0)
            for layer, kept in enumerate(cache.layers):
                self.memory.store(layer, kept, rope, step)
            if step == self.batch - 1:
                self.conditions.popleft()

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
        static.out.copy_(euler_step(static.x, flow, self.sigma, self.sigma_next))
