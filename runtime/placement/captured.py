"""All denoising steps of a block on one GPU as one CUDA graph, rewritten onto the fused ops.

The drop-in for `SingleDevice` where speed counts. One graph serves the growing and the rolling cache: the block's
number and the reference distances are tensors on the device, and everything that follows from them (ring rows, rotary
tables) is computed inside the graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...graphs.capture import Replay
from ...graphs.models.liveavatar import LiveAvatar
from ...graphs.models.liveavatar_memory import Position, RingFormat, StreamMemory
from ...graphs.models.liveavatar_rope import REFERENCE_FRAME, frame_table
from ...graphs.quantize import Fp8Linear
from ...graphs.rewrite.liveavatar import trace_step
from ...graphs.rewrite.program import Prepared, Program
from ...graphs.rewrite.recipe import Recipe, apply
from ..samplers import euler_step
from ..systems.liveavatar_mode import GenerationMode
from ..systems.liveavatar_step import BlockInputs

DEFAULT = Recipe(expect=("concatenate", "fuse"))


@dataclass
class StaticInputs:
    """Every buffer that changes from block to block; `fill` is the only way in."""

    x: Tensor  # [1, C, F, h, w]
    audio: Tensor  # [A, K, C, frames]
    block: Tensor  # int64 [1]
    distances: Tensor  # int64 [steps]
    pose: Tensor | None  # [1, 16, F, h, w]
    out: Tensor  # like x

    @classmethod
    def like(cls, x: Tensor, block: BlockInputs, device: torch.device) -> "StaticInputs":
        pose = None if block.pose is None else torch.zeros_like(block.pose, device=device)
        index, distances = (torch.zeros(n, dtype=torch.int64, device=device) for n in (1, len(block.distances)))
        x, out, audio = (torch.zeros_like(t, device=device) for t in (x, x, block.audio))
        return cls(x, audio, index, distances, pose, out)

    def fill(self, x: Tensor, block: BlockInputs) -> None:
        found = x.shape, block.audio.shape, block.pose is not None
        wanted = self.x.shape, self.audio.shape, self.pose is not None
        if found != wanted:
            raise ValueError(
                f"this block has (x, audio, pose) {found}, the stream was captured for {wanted}; open a new stream"
            )
        self.x.copy_(x)
        self.audio.copy_(block.audio)
        self.block.fill_(block.index)
        self.distances.copy_(torch.tensor(block.distances))
        if self.pose is not None and block.pose is not None:
            self.pose.copy_(block.pose)


class CapturedBlock:
    """LiveAvatar's steps over static memories; arguments as `SingleDevice`.

    `recipe`: what the compiler does; `ring`: how the caches are kept, None for e4m3 in a model with FP8 layers and the
    model's dtype in others. One actor mask serves the whole stream. The first block traces, compiles and records;
    `program` then holds the rewritten step and its reports.
    """

    def __init__(
        self,
        dit: LiveAvatar,
        context: Tensor,
        mode: GenerationMode,
        grid: tuple[int, int],
        recipe: Recipe = DEFAULT,
        ring: RingFormat | None = None,
    ):
        self.dit, self.mode, self.recipe = dit, mode, recipe
        self.grid = grid[0] // 2, grid[1] // 2
        fp8 = any(isinstance(module, Fp8Linear) for module in dit.modules())
        self.ring = ring or RingFormat(dit.dtype, "fp8" if fp8 else None)
        self.text = dit.embed_text(context.to(device=dit.device, dtype=dit.dtype))
        schedule = mode.schedule()
        self.sigmas = schedule.sigmas.to(dit.device)  # a copy from the host cannot be captured
        self.times = [dit.embed_time(t.float().reshape(1, 1).to(dit.device)) for t in schedule.timesteps[: mode.steps]]
        zero = torch.zeros(1, dtype=torch.int32, device=dit.device)
        self.position = Position(zero, zero.clone())
        self.memory: StreamMemory | None = None
        self.static: StaticInputs | None = None
        self.program: Program | None = None
        self.prepared: list[Prepared] = []  # the noise level of each step
        self.memories: list[Prepared] = []  # likewise
        self.text_inputs = Prepared([])
        self.actor_mask: Tensor | None = None
        self.mask: Tensor | None = None
        self.replay = Replay(self._denoise, dit.device)

    @property
    def block_tokens(self) -> int:
        return self.dit.config.num_frames_per_block * self.grid[0] * self.grid[1]

    @torch.no_grad()
    def condition(self, reference: Tensor, motion: Tensor) -> None:
        """Replace the condition: reference latent [1, 16, 1, h, w], motion latents [1, 16, T, h, w]."""
        sink = self.dit.prefill(reference.to(self.dit.dtype), motion.to(self.dit.dtype), self.text)
        if self.memory is None:
            self.memory = self._allocate(sink.layers[0].k.shape[1])
        self.memory.store_condition(sink)

    def _allocate(self, condition_tokens: int) -> StreamMemory:
        config = self.dit.config
        frames = self.mode.cache_latents or config.cache_frames
        return StreamMemory.allocate(
            [(block.self_attn.norm_q.weight, block.self_attn.norm_k.weight) for block in self.dit.layers],
            self.position,
            steps=self.mode.steps,
            reference_tokens=self.grid[0] * self.grid[1],
            condition_tokens=condition_tokens,
            block_tokens=self.block_tokens,
            blocks=frames // config.num_frames_per_block,
            num_heads=config.num_heads,
            ring=self.ring,
        )

    @torch.no_grad()
    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor:
        """Latents [1, 16, block latents, h, w] at the first step's noise level -> after the last step."""
        static = self._fill(x, block)
        if self.program is None:
            self.program = self._compile(block)
        self.replay()
        return static.out.clone()

    @torch.no_grad()
    def compile(self, x: Tensor, block: BlockInputs) -> Program:
        """The rewritten step for inputs like these, without running it; works on the meta device too."""
        self._fill(x, block)
        self.program = self._compile(block)
        return self.program

    def _fill(self, x: Tensor, block: BlockInputs) -> StaticInputs:
        if self.memory is None:
            raise RuntimeError("there is no condition yet; call condition() before the first block")
        if self.static is None:
            self.static = StaticInputs.like(x, block, self.dit.device)
            self.actor_mask = block.actor_mask
        if block.actor_mask is not self.actor_mask:
            raise ValueError("this block has another actor mask than the stream began with; open a new stream")
        self.static.fill(x, block)
        return self.static

    def _compile(self, block: BlockInputs) -> Program:
        dit, static, memory = self.dit, self.static, self.memory
        assert static is not None and memory is not None
        audio = dit.encode_audio(static.audio)
        self.mask = dit.token_mask(audio, block.actor_mask, static.x.shape[2], self.grid)
        rope = dit.noisy_rope(0, static.x.shape[2], self.grid)
        program = trace_step(
            dit, static.x, self.times[0], self.text, audio, memory.layers[0], rope, static.pose, self.mask
        )
        apply(program, self.recipe)
        self.prepared = [program.prepare("time", time) for time in self.times]
        self.text_inputs = program.prepare("text", self.text)
        self.memories = [program.prepare("memories", layers) for layers in memory.layers]
        return program

    def _denoise(self) -> None:
        """The whole block over static tensors: what the graph holds."""
        dit, static, memory, program = self.dit, self.static, self.memory, self.program
        assert static is not None and memory is not None and program is not None
        frames = static.x.shape[2]
        blocks = (self.mode.cache_latents or dit.config.cache_frames) // frames
        place = Position.of(static.block, self.block_tokens, blocks * self.block_tokens)
        self.position.write.copy_(place.write)
        self.position.length.copy_(place.length)
        first = static.block[0] * frames
        rope = dit.noisy_rope(first, frames, self.grid)
        audio = program.prepare("audio", dit.encode_audio(static.audio))
        x = static.x
        for step, time in enumerate(self.prepared):
            self._move_reference(memory.reference_ropes[step], first, static.distances[step])
            flow = program(
                x=x,
                time=time,
                text=self.text_inputs,
                audio=audio,
                memories=self.memories[step],
                rope=rope,
                cond_states=static.pose,
                mask=self.mask,
            )
            x = euler_step(x, flow, self.sigmas[step], self.sigmas[step + 1])
        static.out.copy_(x)

    def _move_reference(self, table: Tensor, first: Tensor, distance: Tensor) -> None:
        """The reference's rotary table for a block that starts at frame `first` (`liveavatar_rope.ref_shift`)."""
        config = self.dit.config
        shift = (first - (REFERENCE_FRAME - distance)).clamp(min=0)
        at = REFERENCE_FRAME + shift
        table.copy_(frame_table(at, 1, self.grid, config.head_dim, config.rope_dtype, table.device))
