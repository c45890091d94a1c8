"""`kinora bench stream`: a session from its opening to its steady state, by the wall clock, as a user has it.

Two sessions run one after the other; the first also pays for compiling, tuning and capturing ("cold"), the second finds
that done ("warm"), as sessions after `Avatar.warm_up` do. A session is opened with a picture; then sound arrives block
by block, always in time: the times are of work, not of waiting. A third session says where the time goes, stage by
stage (`stages.py`), in `metrics`: "opening/VAE encode", "first block/denoise", "steady block/VAE decode", ..., seconds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..runtime.avatar import Avatar
from ..runtime.placement.base import Placement
from ..runtime.placement.engines import SinglePlacement
from ..runtime.systems.liveavatar import LiveAvatarSystem
from ..runtime.systems.liveavatar_mode import AUDIO_RATE
from .captured import captured_placement
from .harness.report import Result
from .harness.run import Bench
from .harness.timing import Timing
from .models import ModelChoice
from .stages import Stages
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
    """Both sessions of one variant, then the one by stages; peak memory is that of all."""
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    placement = captured_placement(system) if blank.variant == "kinora" else SinglePlacement(system)
    avatar = Avatar(blank.name, system, placement)
    with running_sessions(blank.variant, system), bench.watching() as watch:
        cold, warm = (_run(avatar, size, seed) for seed in range(2))
        stages = _by_stage(system, placement, size)
    timing, frames = Timing.of(cold.blocks, warm.blocks), system.mode.block_frames
    metrics = {
        "fps": frames / timing.seconds,
        "opening_seconds_cold": cold.opening,
        "opening_seconds_warm": warm.opening,
        "first_frame_seconds_cold": cold.first_frame,
        "first_frame_seconds_warm": warm.first_frame,
        **stages,
    }
    peak = None
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(bench.device)
        metrics["peak_reserved_bytes"] = float(torch.cuda.max_memory_reserved(bench.device))  # graphs' pools included
    return bench.rated(replace(blank, metrics=metrics, load=watch.load, peak_memory=peak), timing)


@contextmanager
def running_sessions(variant: str, system: LiveAvatarSystem) -> Iterator[None]:
    """As `running`; the captured variant needs nothing around it."""
    if variant == "kinora":
        yield
        return
    with running(variant, system.dit, system.vae):
        yield


def _by_stage(system: LiveAvatarSystem, placement: Placement, size: tuple[int, int]) -> dict[str, float]:
    """Seconds of the stages of an opening, of the first block, and of a steady block (mean)."""
    stages = Stages(system.dit.device)

    def enter(phase: str) -> Callable[[], None]:
        return lambda: setattr(stages, "phase", phase)

    avatar = Avatar("stages", stages.system(system), stages.placement(placement))
    _run(avatar, size, seed=2, opened=enter("first block"), seen=enter("steady block"))
    blocks = filling_blocks(system) + STEADY_BLOCKS - 1
    return {
        f"{phase}/{stage}": seconds / (blocks if phase == "steady block" else 1)
        for (phase, stage), seconds in stages.seconds.items()
    }


def filling_blocks(system: LiveAvatarSystem) -> int:
    """Blocks until the rolling caches are full."""
    return (system.mode.cache_latents or system.dit.config.cache_frames) // system.mode.block_latents


def _run(
    avatar: Avatar,
    size: tuple[int, int],
    seed: int,
    opened: Callable[[], None] = lambda: None,
    seen: Callable[[], None] = lambda: None,
) -> Run:
    """Open a session, fill its caches, time its steady blocks; tells when it is `opened`, and when its first frames
    were `seen`. RuntimeError when no frames come."""
    system, mode = avatar.system, avatar.mode
    samples, filling = mode.block_frames * mode.samples_per_frame, filling_blocks(system)
    sound = voice(samples * (filling + STEADY_BLOCKS + MOST_SILENT_FEEDS), seed)
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    started = time.perf_counter()
    session = avatar.stream(picture, seed=seed, size=size)
    _finish(system)
    opening, working = time.perf_counter() - started, 0.0
    opened()
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
            if not blocks:
                first_frame = working
                seen()
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
