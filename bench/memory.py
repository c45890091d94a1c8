"""`python -m kinora.bench.memory`: what a captured session of LiveAvatar 14B holds on the GPU, part by part.

Counted from the tensors themselves, built on the meta device: no GPU and no memory are needed. Every storage counts
once, for the first part that holds it. Working memory is the peak of what one denoising step's graph has alive; what
libraries take for themselves (cuBLAS, cuDNN, the CUDA context) is not seen here.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar
from ..graphs.models.liveavatar_memory import Fp8Memory, LayerMemory, RingFormat
from ..graphs.models.wan_vae import BF16_AUTOCAST, WAN21_VAE, WanVae
from ..graphs.quantize import quantize_linears
from ..graphs.rewrite.nodes import VIEWS
from ..graphs.rewrite.program import Program
from ..graphs.rewrite.wan_vae import StreamingDecoder, StreamingEncoder
from ..graphs.rewrite.wan_vae_stages import Scratch
from ..runtime.compile import PUBLISHED_SIZE
from ..runtime.placement.batched_steps import BatchedSteps
from ..runtime.placement.captured import CapturedBlock
from ..runtime.placement.captured_vae import DECODED, ENCODED
from ..runtime.placement.static_stream import StaticStream
from ..runtime.systems.liveavatar_mode import STREAM


@dataclass(frozen=True)
class Part:
    name: str
    bytes: int


def account(stream: StaticStream, *vae: tuple[str, object]) -> list[Part]:
    """What a compiled stream holds, and further things by name (the VAE's streams), every storage once."""
    dit, program, memory = stream.dit, stream.compile(), stream.memory
    memories = [layer for step in memory.layers for layer in step]
    prefill = stream.prefill
    programs, latents = [program, prefill.compile()], [prefill.reference, prefill.motion, prefill.rope]
    prepared = [prefill.still, *(getattr(stream, name, None) for name in ("times", "time"))]
    things: list[tuple[str, object]] = [
        ("transformer weights", dit),
        ("what the compiler added", [[*p.module.buffers()] for p in programs]),
        ("modulation of every noise level", prepared),
        ("text keys and values", stream.text.layers),
        ("condition keys and values", [_condition(layer) for layer in memories]),
        ("reference keys before rotation", [layer.reference for layer in memories]),
        ("rings", [layer.ring if isinstance(layer, Fp8Memory) else layer.cache for layer in memories]),
        ("inputs and tables", [stream.static, memory, latents]),
        *vae,
    ]
    seen: set[int] = set()
    parts = [Part(name, _bytes(thing, seen)) for name, thing in things]
    return [*parts, Part("working memory of a graph", max(working_bytes(p) for p in programs))]


def _condition(layer: LayerMemory) -> object:
    return layer.condition if isinstance(layer, Fp8Memory) else None  # a joined cache counts as ring


def working_bytes(program: Program) -> int:
    """The most that the results of a graph's calls take at one time, each alive from its call to its last reader."""
    nodes = list(program.graph.nodes)
    base: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        view = node.op == "call_function" and node.target in VIEWS
        base[node] = base[node.all_input_nodes[0]] if view else node
        for source in node.all_input_nodes:
            last[base[source]] = i
    ends: dict[int, int] = {}
    peak = alive = 0
    for i, node in enumerate(nodes):
        if node.op == "call_function" and base[node] is node:
            size = sum(t.nbytes for t in _tensors(node.meta.get("val"), set()))
            alive += size
            ends[last.get(node, i)] = ends.get(last.get(node, i), 0) + size
        peak = max(peak, alive)
        alive -= ends.pop(i, 0)
    return peak


def _bytes(thing: object, seen: set[int]) -> int:
    """Storages that `thing` holds and that are not in `seen`, which grows."""
    found = 0
    for t in _tensors(thing, set()):
        storage = t.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found += storage.nbytes()
    return found


def _tensors(thing: object, visited: set[int]) -> Iterator[Tensor]:
    """All tensors in modules, containers, dataclasses and our own objects."""
    if id(thing) in visited:
        return
    visited.add(id(thing))
    inner: Iterable[Any] = ()
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        inner = (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, list | tuple):
        inner = thing
    elif isinstance(thing, dict):
        inner = thing.values()
    elif is_dataclass(thing):
        inner = [getattr(thing, f.name) for f in fields(thing)]
    elif type(thing).__module__.startswith("kinora."):
        inner = vars(thing).values()
    for part in inner:
        yield from _tensors(part, visited)


def published(
    precision: str, batched: bool = False, size: tuple[int, int] = PUBLISHED_SIZE, ring: RingFormat | None = None
) -> list[Part]:
    """LiveAvatar 14B and the Wan VAE in "bf16" or "fp8", at `size` (height, width); `ring` None: in slots for FP8."""
    with torch.device("meta"):
        dit, vae = LiveAvatar(LIVEAVATAR_14B), WanVae(WAN21_VAE, BF16_AUTOCAST)
    dit.to(torch.bfloat16).eval().requires_grad_(False)
    if precision == "fp8":
        quantize_linears(dit, granularity="row")
    grid = size[0] // 8, size[1] // 8
    kind: type[StaticStream] = BatchedSteps if batched else CapturedBlock
    with torch.no_grad():
        stream = kind(dit, torch.zeros(1, LIVEAVATAR_14B.text_dim, device="meta"), STREAM, grid, ring=ring)
        scratch = Scratch()
        decoder = StreamingDecoder(vae, *grid, DECODED, scratch=scratch)
        encoder = StreamingEncoder(vae, *size, ENCODED, scratch=scratch)
        return account(stream, ("VAE weights", vae), ("VAE decoder", decoder), ("VAE encoder", encoder))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="fp8")
    parser.add_argument("--batched", action="store_true", help="the steps of consecutive blocks in one forward")
    parser.add_argument("--joined", action="store_true", help="caches in one buffer, as where cuDNN's frontend is")
    args = parser.parse_args(argv)
    if args.joined and args.precision != "fp8":
        parser.error("--joined is for --precision fp8; bf16 caches are always in one buffer")
    ring = RingFormat(torch.bfloat16, "joined") if args.joined else None
    parts = published(args.precision, args.batched, ring=ring)
    for part in parts:
        print(f"{part.name:34} {part.bytes / 1e9:7.2f} GB")
    print(f"{'all':34} {sum(part.bytes for part in parts) / 1e9:7.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
