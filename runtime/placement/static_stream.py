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
from ..systems.liveavatar_mode import GenerationMode
from ..systems.liveavatar_step import BlockInputs

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

    def fill(self, sample: int, x: Tensor, block: BlockInputs) -> None:
        """Take in what belongs to one sample: latents, audio, number of the block, pose. ValueError for other shapes.

        The mask is that of all samples.
        """
        mask = None if block.actor_mask is None else block.actor_mask[:, : x.shape[2]].flatten(1)
        given = {"latents": x[0], "audio": block.audio, "pose": block.pose, "actor mask": mask}
        own = {"latents": self.x[0], "audio": self.audio[0], "pose": self.pose, "actor mask": self.mask}
        for name, tensor in own.items():
            found, wanted = (None if t is None else tuple(t.shape[-4:]) for t in (given[name], tensor))
            if found != wanted:
                raise ValueError(f"this block has {name} {found}, the stream was made for {wanted}; open a new stream")
        self.x[sample].copy_(x[0])
        self.audio[sample].copy_(block.audio)
        self.block[sample].fill_(block.index)
        if self.pose is not None and block.pose is not None:
            self.pose[sample].copy_(block.pose[0])
        if self.mask is not None and mask is not None:
            self.mask.copy_(mask)


class StaticStream(ABC):
    """A stream of blocks over static buffers; subclasses say what one replay does (`_run`).

    `context` [n, text_dim]: prompt rows; `grid`: latent (rows, columns); `recipe`: what the compiler does; `ring`: how
    the caches are kept, None for e4m3 in a model with FP8 layers and heads of 32, 64 or 128, and the model's dtype in
    others; `shape`: the kind of blocks; `pool`: working memory shared with other graphs. The projections of `dit` are
    joined in place (same names, same values), so that the compiler's joined weights take no memory of their own.
    Errors: ValueError for a model with a local attention window, which a static ring does not have.
    """

    batch = 1

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

    # What subclasses decide

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

    own_conditions = False

    # The life of a stream

    @torch.no_grad()
    def begin(self, context: Tensor) -> None:
        """Start another stream in these buffers, with another prompt [n, text_dim]; a condition must follow."""
        text = self._embed(context)
        for own, new in zip(pytree.tree_leaves(self.text), pytree.tree_leaves(text), strict=True):
            own.copy_(new)
        self.memory.clear()

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
        """Compile, and on a GPU record the graph; otherwise the first block does. What the stream holds is lost."""
        self.compile()
        self.replay.record()

    # For subclasses

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
