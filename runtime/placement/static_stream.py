"""What the captured placements share: a stream whose inputs, prompt and memories lie in static buffers.

Everything is allocated and compiled once, for a video size, a mode and a `BlockShape`; another stream of the same kind
begins in the same buffers (`begin`), with nothing traced or recorded again.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ...graphs.capture import Pool, Replay
from ...graphs.joined_weights import join_projections
from ...graphs.models.liveavatar import LiveAvatar, Text
from ...graphs.models.liveavatar_cache import Memory
from ...graphs.models.liveavatar_memory import Position, RingFormat, StreamMemory
from ...graphs.models.liveavatar_rope import REFERENCE_FRAME, frame_table
from ...graphs.models.liveavatar_text import embed_text_fp8
from ...graphs.quantize import Fp8Linear
from ...graphs.rewrite.liveavatar import trace_step
from ...graphs.rewrite.program import Prepared, Program
from ...graphs.rewrite.recipe import Recipe, apply
from ...kernels import attention_joined
from ...kernels.qk_rows import HEAD_DIMS
from ..systems.liveavatar import Denoiser
from ..systems.liveavatar_mode import GenerationMode
from ..systems.liveavatar_step import BlockInputs
from .captured_prefill import CapturedPrefill

FP8_HEAD_DIMS = HEAD_DIMS[1:]  # of `attention_fp8`
DEFAULT = Recipe(expect=("concatenate", "fuse"))


@dataclass(frozen=True)
class BlockShape:
    """Who speaks and whether the body is led: `actors` voices, with a mask of their places or without; pose latents."""

    actors: int = 1
    masked: bool = False
    pose: bool = False

    @classmethod
    def of(cls, block: BlockInputs) -> "BlockShape":
        return cls(len(block.audio), block.actor_mask is not None, block.pose is not None)


@dataclass(frozen=True)
class StaticInputs:
    """Every buffer that changes from block to block, for B samples; `fill` is the only way in."""

    x: Tensor  # [B, C, F, h, w]
    audio: Tensor  # [B, A, K, C, frames]
    block: Tensor  # int64 [B]
    distances: Tensor  # int64 [steps]
    pose: Tensor | None  # [B, 16, F, h, w]
    mask: Tensor | None  # [A, F * P]
    out: Tensor  # like x

    @classmethod
    def allocate(
        cls, dit: LiveAvatar, mode: GenerationMode, grid: tuple[int, int], shape: BlockShape, batch: int
    ) -> "StaticInputs":
        """Zeros on the device of `dit`; `grid`: latent (rows, columns)."""
        config, device = dit.config, dit.device
        frames = config.num_frames_per_block
        latents, width = (batch, config.in_dim, frames, *grid), mode.frames_per_latent * frames
        tokens = frames * (grid[0] // 2) * (grid[1] // 2)
        return cls(
            torch.zeros(latents, dtype=dit.dtype, device=device),
            torch.zeros(batch, shape.actors, config.audio_layers, config.audio_dim, width, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(mode.steps, dtype=torch.int64, device=device),
            torch.zeros(batch, config.cond_dim, *latents[2:], dtype=dit.dtype, device=device) if shape.pose else None,
            torch.zeros(shape.actors, tokens, device=device) if shape.masked else None,
            torch.zeros(latents, dtype=dit.dtype, device=device),
        )

    def fill(self, x: Tensor, block: BlockInputs) -> None:
        """Take in the next block as sample 0: latents, audio, number of the block, pose; its mask is that of all.
        ValueError for other shapes."""
        mask = None if block.actor_mask is None else block.actor_mask[:, : x.shape[2]].flatten(1)
        given = {"latents": x[0], "audio": block.audio, "pose": block.pose, "actor mask": mask}
        own = {"latents": self.x[0], "audio": self.audio[0], "pose": self.pose, "actor mask": self.mask}
        for name, tensor in own.items():
            found, wanted = (None if t is None else tuple(t.shape[-4:]) for t in (given[name], tensor))
            if found != wanted:
                raise ValueError(f"this block has {name} {found}, the stream was made for {wanted}; open a new stream")
        self.x[0].copy_(x[0])
        self.audio[0].copy_(block.audio)
        self.block[0].fill_(block.index)
        if self.pose is not None and block.pose is not None:
            self.pose[0].copy_(block.pose[0])
        if self.mask is not None and mask is not None:
            self.mask.copy_(mask)

    def move_on(self) -> None:
        """Every block one sample further: its latents as they came out, its audio, its pose; the last one leaves."""
        self.x[1:].copy_(self.out[:-1])
        for own in (self.audio, self.pose):
            if own is not None and len(own) > 1:
                own[1:].copy_(own[:-1].clone())


class StaticStream(Denoiser, ABC):
    """Denoising over static buffers; subclasses say what one replay does (`_run`).

    `context` [n, text_dim]: prompt rows; `grid`: latent (rows, columns); `recipe`: what the compiler does; `ring`: how
    the caches are kept, None for e4m3 in a model with FP8 layers and heads of 32, 64 or 128, and the model's dtype in
    others; `shape`: the kind of blocks; `pool`: working memory shared with other graphs. The projections of `dit` are
    joined in place (same names, same values), so that the compiler's joined weights take no memory of their own.
    On a CPU the programs run call by call.
    Errors: ValueError for a model with a local attention window, which a static ring does not have.
    """

    own_conditions = False  # each step keeps the condition for itself

    @torch.no_grad()
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
        if dit.config.local_attn_size != -1:
            raise ValueError(
                f"local_attn_size is {dit.config.local_attn_size}; a captured stream attends all of its ring (-1): "
                "use placement 'single'"
            )
        self.dit, self.mode, self.recipe = dit, mode, recipe
        self.grid = grid[0] // 2, grid[1] // 2  # patches
        self.shape = shape or BlockShape()
        self.ring = ring or _ring_of(dit)
        join_projections(dit)
        self.text = self._embed(context)
        schedule = mode.schedule()
        self.sigmas = schedule.sigmas.to(dit.device)  # a copy from the host cannot be captured
        self.timesteps = schedule.timesteps[: mode.steps].float().to(dit.device)
        self.static = StaticInputs.allocate(dit, mode, grid, self.shape, self.batch)
        self.positions = self._places()
        self.memory = self._allocate()
        self.program: Program | None = None
        self.packed: dict[str, tuple[Tensor, Tensor]] = {}  # weights that the recipe quantised, for all programs
        self.text_inputs = Prepared([])
        self.replay = Replay(self._run, dit.device, pool)
        self.prefill = CapturedPrefill(dit, self.text, self.memory, grid, recipe, self.packed, pool)
        self._forget()

    # What subclasses decide

    @property
    @abstractmethod
    def batch(self) -> int:
        """Blocks that one replay works on."""

    @abstractmethod
    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor | None:
        """Latents [1, 16, block latents, h, w] at the first step's noise level -> those of the block that is finished
        now, None when none is. RuntimeError without a condition, ValueError for a block that the stream is not for."""

    @abstractmethod
    def _places(self) -> list[Position]:
        """The position of every step."""

    @abstractmethod
    def _trace(self) -> Program:
        """The step as a program, not rewritten; `_prepare` follows."""

    @abstractmethod
    def _prepare(self, program: Program) -> None:
        """Compute what the rewritten program wants ahead."""

    @abstractmethod
    def _run(self) -> None:
        """What the graph holds: from the static inputs to `static.out`."""

    # The life of a stream

    @torch.no_grad()
    def begin(self, context: Tensor) -> None:
        """Start another stream in these buffers, with another prompt [n, text_dim]; a condition must follow."""
        text = self._embed(context)
        for own, new in zip(pytree.tree_leaves(self.text), pytree.tree_leaves(text), strict=True):
            own.copy_(new)
        self._forget()

    @torch.no_grad()
    def condition(self, reference: Tensor, motion: Tensor) -> None:
        """Replace the condition of the blocks that follow: reference latent [1, 16, 1, h, w], motion latents
        [1, 16, T, h, w]. ValueError for latents of another size than the stream's."""
        self.prefill(reference, motion)
        self.conditioned = True

    @torch.no_grad()
    def compile(self) -> Program:
        """The rewritten step with its reports, without running it; works on the meta device too."""
        if self.program is None:
            self.program = apply(self._trace(), self.recipe, self.packed)
            self.text_inputs = self.program.prepare("text", self.text)
            self._prepare(self.program)
        return self.program

    @torch.no_grad()
    def record(self) -> None:
        """Compile, and on a GPU record the graphs; otherwise the first block does. What the stream holds is lost."""
        self.compile()
        self.replay.record()  # first: it takes the most of the working memory that both share
        self.prefill.record()
        self._forget()  # the warm-up's condition has set scales

    # For subclasses

    def _forget(self) -> None:
        """Back to before the first condition and block."""
        self.memory.clear()
        self.conditioned = False

    def _check_conditioned(self) -> None:
        if not self.conditioned:
            raise RuntimeError("there is no condition yet; call condition() before the first block")

    @property
    def frames(self) -> int:
        """Latent frames of a block."""
        return self.dit.config.num_frames_per_block

    @property
    def block_tokens(self) -> int:
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def ring_blocks(self) -> int:
        return (self.mode.cache_latents or self.dit.config.cache_frames) // self.frames

    def _embed(self, context: Tensor) -> Text:
        """Keys and values of a prompt as the caches have theirs: in e4m3 where cuDNN attends them so."""
        context = context.to(device=self.dit.device, dtype=self.dit.dtype)
        if self.ring.values != "joined":
            return self.dit.embed_text(context)
        rows = max(self.batch * self.block_tokens, self.dit.condition_tokens(self.grid))
        return embed_text_fp8(self.dit, context, rows)

    def _allocate(self) -> StreamMemory:
        return StreamMemory.allocate(
            [(block.self_attn.norm_q.weight, block.self_attn.norm_k.weight) for block in self.dit.layers],
            self.positions,
            reference_tokens=self.grid[0] * self.grid[1],
            condition_tokens=self.dit.condition_tokens(self.grid),
            block_tokens=self.block_tokens,
            blocks=self.ring_blocks,
            num_heads=self.dit.config.num_heads,
            ring=self.ring,
            own_conditions=self.own_conditions,
        )

    def _trace_with(self, times: Tensor, memories: Sequence[Memory], rope: Tensor) -> Program:
        """The step at times [B], over each layer's memory, with the block's rotary table."""
        static = self.static
        audio, time = self.dit.encode_audio(static.audio.flatten(0, 1)), self.dit.embed_time(times[:, None])
        return trace_step(self.dit, static.x, time, self.text, audio, memories, rope, static.pose, static.mask)

    def _place(self, position: Position, block: Tensor) -> None:
        """Move a position to block number `block` (int64 [1])."""
        capacity = self.ring_blocks * self.block_tokens
        position.move(Position.of(block, self.block_tokens, capacity, self.dit.condition_tokens(self.grid)))

    def _move_reference(self, step: int, first: Tensor) -> None:
        """The reference's rotary table of a step whose block starts at frame `first` (`liveavatar_rope.ref_shift`)."""
        config, table = self.dit.config, self.memory.reference_ropes[step]
        shift = (first - (REFERENCE_FRAME - self.static.distances[step])).clamp(min=0)
        table.copy_(
            frame_table(REFERENCE_FRAME + shift, 1, self.grid, config.head_dim, config.rope_dtype, table.device)
        )


def _ring_of(dit: LiveAvatar) -> RingFormat:
    """E4m3 where the layers are and the attention kernel has the head size; the model's dtype elsewhere.

    In one buffer where cuDNN's attention is, which is the fastest.
    """
    fp8 = any(isinstance(module, Fp8Linear) for module in dit.modules())
    if not fp8 or dit.config.head_dim not in FP8_HEAD_DIMS:
        return RingFormat(dit.dtype)
    joined = dit.device.type == "cuda" and attention_joined.available(dit.device)
    return RingFormat(dit.dtype, "joined" if joined else "fp8")
