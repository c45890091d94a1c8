"""`kinora bench stream`: a session from its opening to its steady state, by the wall clock, as a user has it.

Two sessions run one after the other; the first also pays for compiling, tuning and capturing ("cold"). A session is
opened with a picture; then sound arrives block by block, always in time: the times are of work, not of waiting.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..runtime.placement.single import SingleDevice
from ..runtime.preprocess import image_pixels
from ..runtime.session import Session
from ..runtime.systems.liveavatar import BlockStream, LiveAvatarSystem
from ..runtime.systems.liveavatar_draws import SeededDraws
from ..runtime.systems.liveavatar_mode import AUDIO_RATE
from .captured import captured_block, fast_vae
from .harness.report import Result
from .harness.run import Bench
from .harness.timing import Timing
from .models import ModelChoice
from .variants import running

VARIANTS = ("eager", "compiled", "fused", "kinora")
STEADY_BLOCKS = 6  # timed in each session after its rolling caches are full
MOST_SILENT_FEEDS = 50  # blocks of sound without a frame, before something must be wrong


@dataclass(frozen=True)
class Run:
    """One session, in seconds: its opening, from then to its first frame, and each steady block."""

    opening: float
    first_frame: float
    blocks: tuple[float, ...]


def bench_stream(bench: Bench, choice: ModelChoice, variants: Sequence[str]) -> None:
    """Measure sessions of `choice` in each variant."""
    system = choice.build()
    choice.quantize(system.dit)
    height, width = choice.video_size(system)
    name = f"stream/{choice.name}/{choice.precision}/{width}x{height}"
    for variant in variants:
        bench.say(f"{name}: {variant}")
        blank = Result(name, variant, "ok", precision=choice.precision)
        made = bench.attempt(name, variant, partial(_measure, bench, blank, system, (height, width)))
        if made is not None:
            bench.add(made)


def _measure(bench: Bench, blank: Result, system: LiveAvatarSystem, size: tuple[int, int]) -> Result:
    """Both sessions of one variant; peak memory is that of both."""
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    with running_sessions(blank.variant, system), bench.watching() as watch:
        cold, warm = (_run(blank.variant, system, size, seed) for seed in range(2))
    timing, frames = Timing.of(cold.blocks, warm.blocks), system.mode.block_frames
    metrics = {
        "fps": frames / timing.seconds,
        "opening_seconds_cold": cold.opening,
        "opening_seconds_warm": warm.opening,
        "first_frame_seconds_cold": cold.first_frame,
        "first_frame_seconds_warm": warm.first_frame,
    }
    peak = torch.cuda.max_memory_allocated(bench.device) if on_gpu else None
    return bench.rated(replace(blank, metrics=metrics, load=watch.load, peak_memory=peak), timing)


@contextmanager
def running_sessions(variant: str, system: LiveAvatarSystem) -> Iterator[None]:
    """As `running`; the captured variant needs nothing around it."""
    if variant == "kinora":
        yield
        return
    with running(variant, system.dit, system.vae):
        yield


def open_session(variant: str, system: LiveAvatarSystem, size: tuple[int, int], seed: int) -> Session:
    """What `Avatar.stream` opens, with a random picture, on the denoiser and the VAE of the variant."""
    dit, mode, fast = system.dit, system.mode, variant == "kinora"
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    place = captured_block if fast else SingleDevice

    def open_blocks() -> BlockStream:
        context = system.encode_prompt("")
        return BlockStream(
            fast_vae(system.vae) if fast else system.vae,
            mode,
            image_pixels(picture, *size).to(dit.device),
            lambda grid: place(dit, context, mode, grid),
            SeededDraws(seed, mode, dit.dtype, dit.device),
        )

    return Session(open_blocks, system.audio_features(mode), mode, size)


def _run(variant: str, system: LiveAvatarSystem, size: tuple[int, int], seed: int) -> Run:
    """Open a session, fill its caches, time its steady blocks. RuntimeError when no frames come."""
    mode = system.mode
    samples = mode.block_frames * mode.samples_per_frame
    filling = (mode.cache_latents or system.dit.config.cache_frames) // mode.block_latents
    sound = voice(samples * (filling + STEADY_BLOCKS + MOST_SILENT_FEEDS), seed)
    started = time.perf_counter()
    session = open_session(variant, system, size, seed)
    _finish(system)
    opening, working = time.perf_counter() - started, 0.0
    blocks: list[float] = []
    first_frame = waited = 0.0
    with session:
        for piece in sound.reshape(-1, samples):
            started = time.perf_counter()
            frames = session.feed(piece)  # returns when the frames are on the CPU
            waited += time.perf_counter() - started
            if not len(frames):
                continue
            working += waited
            first_frame = first_frame or working
            blocks.append(waited)
            waited = 0.0
            if len(blocks) == filling + STEADY_BLOCKS:
                return Run(opening, first_frame, tuple(blocks[filling:]))
    raise RuntimeError(f"{len(sound) / AUDIO_RATE:.0f} s of sound gave only {len(blocks)} blocks")


def _finish(system: LiveAvatarSystem) -> None:
    if system.dit.device.type == "cuda":
        torch.cuda.synchronize(system.dit.device)


def voice(samples: int, seed: int) -> np.ndarray:
    """Noise in syllables, float32 [samples]: as loud and as uneven as speech, for which speed does not care further."""
    noise = np.random.default_rng(seed).standard_normal(samples)
    syllables = np.sin(np.arange(samples) * (2 * np.pi * 4 / AUDIO_RATE)) ** 2
    return (0.1 * noise * syllables).astype(np.float32)
