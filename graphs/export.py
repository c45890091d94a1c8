"""LiveAvatar's denoising step and the VAE's streaming decode as functions of tensors, and as AOTInductor packages.

    step(x, timestep, audio, block, distance, text, condition, rings) -> flow; writes into rings
    decode(latents, slots) -> frames, slots

A part is traced and rewritten like any program (`rewrite/`), lowered to what a C++ program can run (`lowering.py`),
and compiled to one `.pt2` file that needs libtorch and nothing of Python. Shapes are fixed: one package a size.
Every tensor in and out is contiguous. The package's metadata tell its "inputs" and "outputs" in order, one line each:
`name dtype size size ...`.

Legend: F latent frames of a block, S ring rows, C condition tokens, H heads, d head size.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .export_memory import ArgumentMemory
from .host_compiler import sharing_compiler
from .lowering import Lowered
from .models.liveavatar import LiveAvatar, TextState
from .models.liveavatar_cache import ConditionCache, KeyValue, condition_table
from .models.liveavatar_memory import Position
from .models.liveavatar_rope import REFERENCE_FRAME
from .models.wan_vae import DecoderState, WanVae
from .rewrite.program import Argument, Program, trace
from .rewrite.recipe import Recipe, apply

STEP = Recipe(fold=False, expect=("concatenate", "fuse"))
"""Nothing is folded: the package is one function, so what depends on its arguments stays inside."""


@dataclass(frozen=True)
class Part:
    """A traced function and example arguments (pytrees of tensors by name), from which its shapes come."""

    program: Program
    arguments: Mapping[str, Any]
    outputs: dict[str, Tensor]
    """What the package returns, by name, in order; their values are empty."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Every tensor that the package takes, in order: "x", "text.0.k", "rings.5.v"."""
        return {name: tensor for key, value in self.arguments.items() for name, tensor in named(key, value)}

    @property
    def metadata(self) -> dict[str, str]:
        return {"inputs": _table(self.inputs), "outputs": _table(self.outputs)}


def named(name: str, value: Any) -> list[tuple[str, Tensor]]:
    """The tensors of an argument with dotted names: ("rings.0.k", ...) for a tuple of `KeyValue`."""
    leaves = pytree.tree_flatten_with_path(value)[0]
    return [(".".join((name, *(str(_word(key)) for key in path))), leaf) for path, leaf in leaves]


def _table(tensors: Mapping[str, Tensor]) -> str:
    """A line a tensor: "x float32 1 16 3 24 24"."""
    return "\n".join(
        " ".join((name, str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape)))
        for name, tensor in tensors.items()
    )


def _word(key: Any) -> Any:
    """A step of a pytree's path: an index, or the name of a field."""
    return key.name if isinstance(key, pytree.GetAttrKey) else key.idx


def trace_step(
    dit: LiveAvatar,
    x: Tensor,
    audio: Tensor,
    text: TextState,
    condition: ConditionCache,
    rings: tuple[KeyValue, ...],
    recipe: Recipe = STEP,
) -> Part:
    """One denoising step of a block for inputs like these.

    x [1, 16, F, h, w] noisy latents; audio [1, K, C, 4F] features of the block; text and condition: `embed_text` and
    `prefill`; rings: k and v [1, S, H, d] of every layer, S a multiple of the block's tokens. The package also takes
    timestep float32 [1], block int64 [1] (its number in the stream) and distance int64 [1] (frames by which the
    reference stays ahead, `liveavatar_rope.ref_shift`). Its result: the flow like x, noise - data.
    """
    grid, frames = condition.grid, x.shape[2]
    tokens = frames * grid[0] * grid[1]
    capacity = rings[0].k.shape[1]
    if capacity % tokens:
        raise ValueError(f"a ring of {capacity} rows does not hold whole blocks of {tokens} tokens")
    motion_rope = condition.motion_rope

    def step(
        x: Tensor,
        timestep: Tensor,
        audio: Tensor,
        block: Tensor,
        distance: Tensor,
        text: tuple[KeyValue, ...],
        condition: tuple[KeyValue, ...],
        rings: tuple[KeyValue, ...],
    ) -> Tensor:
        first = block[0] * frames
        shift = (first - (REFERENCE_FRAME - distance[0])).clamp(min=0)
        reference_rope = condition_table(motion_rope, shift, grid, dit.config.rope_dtype)
        position = Position.of(block, tokens, capacity, condition[0].k.shape[1])
        memories = [
            ArgumentMemory(ring, layer, reference_rope, position) for ring, layer in zip(rings, condition, strict=True)
        ]
        return dit.stream_block(
            x,
            dit.embed_time(timestep.reshape(1, 1)),
            TextState(text),
            dit.encode_audio(audio),
            memories,
            dit.noisy_rope(first, frames, grid),
        )

    def number(dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, dtype=dtype, device=x.device)

    arguments = {
        "x": x,
        "timestep": number(torch.float32),
        "audio": audio,
        "block": number(torch.int64),
        "distance": number(torch.int64),
        "text": text.layers,
        "condition": condition.layers,
        "rings": rings,
    }
    lifetimes = {"timestep": "schedule", "audio": "block", "block": "block", "text": "prompt", "condition": "prompt"}
    program = trace(step, {k: Argument(v, lifetimes.get(k, "step")) for k, v in arguments.items()}, dit)
    return Part(apply(program, recipe), arguments, {"flow": torch.empty_like(x)})


def trace_decode(vae: WanVae, latents: Tensor, state: DecoderState) -> Part:
    """The next block of a decoded stream: latents [1, 16, F, h, w] -> frames [1, 3, 4F, 8h, 8w] in [-1, 1], and the
    slots of the stream after it, for a stream in a state like `state` (one that has begun)."""
    if not state.slots:
        raise ValueError("this stream has not begun: its first block has other shapes; decode one, then export")

    def decode(latents: Tensor, slots: list[Tensor]) -> tuple[Tensor, ...]:
        after = DecoderState(slots)
        frames = vae.decode_stream(latents, after)
        return frames, *(slot.contiguous() for slot in after.slots)

    arguments = {"latents": latents, "slots": [slot.contiguous() for slot in state.slots]}
    program = trace(decode, {k: Argument(v, "step") for k, v in arguments.items()}, vae)
    batch, _, frames, rows, columns = latents.shape
    times, space = vae.config.temporal_factor, vae.config.spatial_factor
    pixels = torch.empty(batch, 3, times * frames, space * rows, space * columns, device="meta")
    return Part(program, arguments, {"frames": pixels} | dict(named("slots", arguments["slots"])))


def package(part: Part, path: Path) -> Path:
    """Compile a part for the device of its arguments and write the package `path` (.pt2); takes minutes.

    Needs a C++ compiler, and on CUDA the device itself.
    """
    from torch._inductor import aoti_compile_and_package

    tensors = tuple(part.inputs.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's exporter warns of its own future
        exported = torch.export.export(Lowered(part.program.module), tensors, strict=False)
        options = {
            "aot_inductor.metadata": part.metadata,
            "comprehensive_padding": False,  # our kernels read tensors with the strides that tracing saw
            "cpp.cxx": (None, sharing_compiler()),
        }
        return Path(aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options))
