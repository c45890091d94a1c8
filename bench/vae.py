"""`kinora bench vae`: decode of one block of latents, and encode of as many frames, in the middle of a stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ..graphs.models.wan_vae import DecoderState, EncoderState, WanVae
from ..kernels.dispatch import using
from ..runtime.placement.captured_vae import CapturedDecoder, CapturedEncoder
from .captured import captured_decoder, captured_encoder
from .harness.run import Bench, Expected, Ready, Work
from .models import ModelChoice, weight_bytes
from .state import INPUTS
from .variants import running
from .work import decode_flops, encode_flops

VARIANTS = ("eager", "compiled", "fused", "kinora")
TOLERANCE = {"float32": 1e-4, "bf16": 3e-2}
LATENTS, WARM_LATENTS = 3, 7  # of a block; decoded before it, so that every layer has its history


def bench_vae(bench: Bench, choice: ModelChoice, variants: Sequence[str]) -> None:
    """Measure decode and encode; the VAE is bf16 where the transformer would be FP8."""
    vae, size = choice.build_vae()
    config, precision = vae.config, "float32" if choice.dtype == torch.float32 else "bf16"
    grid = size[0] // config.spatial_factor, size[1] // config.spatial_factor
    frames = LATENTS * config.temporal_factor
    stem = f"{choice.name}/{precision}/{size[1]}x{size[0]}, {frames} frames"

    def latents(count: int) -> Tensor:
        return torch.randn(1, config.z_dim, count, *grid, device=choice.device)

    def pixels(count: int) -> Tensor:
        return torch.rand(1, 3, count, *size, device=choice.device) * 2 - 1

    passes: dict[str, tuple[Stream, Tensor, list[Tensor]]] = {
        "decode": (DecodeStream, latents(WARM_LATENTS), [latents(LATENTS) for _ in range(INPUTS)]),
        "encode": (EncodeStream, pixels(1), [pixels(frames) for _ in range(INPUTS)]),
    }
    flops = {
        "decode": decode_flops(config, LATENTS, WARM_LATENTS, grid),
        "encode": encode_flops(config, frames, grid),
    }
    for direction, (stream, opening, pieces) in passes.items():
        name = f"{direction}/{stem}"
        first = bench.attempt(name, "reference", partial(_first, vae, stream, opening, pieces[0]))
        if first is None:
            continue
        result, history = first
        moved = weight_bytes(getattr(vae, f"{direction}r")) + pieces[0].nbytes + result.nbytes + 2 * history
        work, expected = Work(flops[direction], moved, precision), Expected(result, TOLERANCE[precision])
        for variant in variants:
            way = partial(_way, variant, vae, stream, opening, pieces)
            bench.measure(name, variant, way, work, expected, metrics=lambda seconds: {"fps": frames / seconds})


class DecodeStream:
    """A decoder that has decoded `opening`; each call decodes the next latents [1, z, F, h, w]."""

    def __init__(self, vae: WanVae | CapturedDecoder, opening: Tensor):
        self.vae, self.state = vae, DecoderState()
        vae.decode_stream(opening, self.state)

    @classmethod
    def captured(cls, vae: WanVae, opening: Tensor) -> "DecodeStream":
        return cls(captured_decoder(vae, (opening.shape[3], opening.shape[4]), LATENTS), opening)

    def __call__(self, latents: Tensor) -> Tensor:
        return self.vae.decode_stream(latents, self.state)


class EncodeStream:
    """An encoder that has encoded `opening`; each call encodes the next frames [1, 3, T, H, W]."""

    def __init__(self, vae: WanVae | CapturedEncoder, opening: Tensor):
        self.vae, self.state = vae, EncoderState()
        vae.encode_stream(opening, self.state)

    @classmethod
    def captured(cls, vae: WanVae, opening: Tensor) -> "EncodeStream":
        return cls(captured_encoder(vae, (opening.shape[3], opening.shape[4]), LATENTS), opening)

    def __call__(self, frames: Tensor) -> Tensor:
        return self.vae.encode_stream(frames, self.state)


Stream = type[DecodeStream] | type[EncodeStream]


def _first(vae: WanVae, stream: Stream, opening: Tensor, piece: Tensor) -> tuple[Tensor, int]:
    """(the plain model's result of `piece` after `opening`, bytes of the history that it carries on)."""
    with torch.no_grad(), using(False):
        opened = stream(vae, opening)
        return opened(piece), sum(slot.nbytes for slot in opened.state.slots)


@contextmanager
def _way(variant: str, vae: WanVae, stream: Stream, opening: Tensor, pieces: Sequence[Tensor]) -> Iterator[Ready]:
    fast = variant == "kinora"
    with nullcontext() if fast else running("eager" if variant == "compiled" else variant, vae=vae):
        opened = (
            stream.captured(vae, opening) if fast else stream(vae, opening)
        )  # not compiled: a shape that comes once
    with nullcontext() if fast else running(variant, vae=vae):
        calls = [partial(opened, piece) for piece in pieces]
        yield Ready(calls, calls[0])  # the check comes first: it sees the stream right after its opening
