"""`kinora bench block`: what one block of the stream costs on one GPU: all denoising steps, then the VAE's decode.

Frames per second are the block's frames over its time: the speed of a stream that never waits. The caches are full, the
decoder is in the middle of its stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..kernels.dispatch import using
from ..runtime.placement.single import SingleDevice
from ..runtime.systems.codec import StreamCodec
from ..runtime.systems.liveavatar import ImmediateDenoiser, LiveAvatarSystem
from ..runtime.systems.liveavatar_decode import StreamDecoder
from .captured import captured_block, captured_decoder
from .harness.run import Bench, Expected, Ready, Work
from .models import ModelChoice, weight_bytes
from .state import BlockCase, Kept, release
from .variants import running
from .work import audio_flops, decode_flops, step_flops

VARIANTS = ("eager", "compiled", "fused", "kinora")
TOLERANCE = {"float32": 1e-3, "bf16": 1e-1, "fp8": 2.5e-1}
"""Of the frames after all steps and the decoder, against the eager model before quantisation."""


class BlockCall:
    """Noise [1, C, 3, h, w] -> the frames [3, n, H, W] of a block in the middle of a stream."""

    def __init__(self, case: BlockCase, denoiser: ImmediateDenoiser, vae: StreamCodec):
        self.case, self.denoiser = case, denoiser
        self.decoder = opened_decoder(case, vae)

    def __call__(self, x: Tensor) -> Tensor:
        return self.decoder.push(self.denoiser.denoise(x, self.case.inputs(self.case.index)))


def bench_block(bench: Bench, choice: ModelChoice, variants: Sequence[str]) -> None:
    """Measure one block of `choice` in each variant."""
    system = choice.build()
    mode, (height, width) = system.mode, choice.video_size(system)
    case = BlockCase.of(system, (height, width))
    name = f"block/{choice.name}/{choice.precision}/{width}x{height}, {mode.steps} steps"
    made = bench.attempt(name, "reference", partial(_prepare, case, system))
    if made is None:
        return
    frames, caches = made
    choice.quantize(system.dit)
    shown = frames.shape[1]
    moved = mode.steps * weight_bytes(system.dit) + caches + weight_bytes(system.vae.decoder)  # each once a step
    work, plain = Work(_flops(system, case), moved, choice.precision), Kept(case.single)
    expected = Expected(frames, TOLERANCE[choice.precision])
    for variant in variants:
        way = partial(_way, variant, case, system, plain)
        bench.measure(name, variant, way, work, expected, metrics=lambda seconds: {"fps": shown / seconds})


def _prepare(case: BlockCase, system: LiveAvatarSystem) -> tuple[Tensor, int]:
    """(the eager model's frames of the first noise, bytes of the rolling caches).

    The caches go before the decoder comes: beside weights in bf16 they leave it no room on a GPU of 80 GB.
    """
    with torch.no_grad(), using(False):
        denoiser = case.single()
        latents = denoiser.denoise(case.noises[0], case.inputs(case.index))
        caches = sum(step.cache.k.nbytes + step.cache.v.nbytes for step in denoiser.steps)
        del denoiser
        release()
        return opened_decoder(case, system.vae).push(latents), caches


def opened_decoder(case: BlockCase, vae: StreamCodec) -> StreamDecoder:
    """In the middle of its stream: it has decoded the opening block, which is shorter."""
    decoder = StreamDecoder(vae, case.motion.float(), case.mode)
    decoder.push(case.noises[0].float())
    return decoder


@contextmanager
def _way(variant: str, case: BlockCase, system: LiveAvatarSystem, plain: Kept[SingleDevice]) -> Iterator[Ready]:
    if variant == "kinora":
        plain.free()
        captured = case.open(captured_block(case.dit, case.prompt, case.mode, case.grid))
        decoder = captured_decoder(system.vae, case.grid, case.mode.block_latents)
        yield _ready(BlockCall(case, captured, decoder))
        return
    with running("eager" if variant == "compiled" else variant, system.dit, system.vae):
        call = BlockCall(case, plain.get(), system.vae)  # not compiled: the shapes of its opening come only once
    with running(variant, system.dit, system.vae):
        yield _ready(call)


def _ready(call: BlockCall) -> Ready:
    calls = [partial(call, x) for x in call.case.noises]
    return Ready(calls, calls[0])  # the check comes first: it sees the decoder right after its opening


def _flops(system: LiveAvatarSystem, case: BlockCase) -> float:
    mode, dit, vae = system.mode, system.dit.config, system.vae.config
    return (
        mode.steps * step_flops(dit, mode, case.grid)
        + audio_flops(dit, mode.block_frames)
        + decode_flops(vae, mode.block_latents, mode.warm_latents, case.grid)
    )
