"""`kinora bench stream`: a session from its opening to its steady state, by the wall clock, as a user has it.

Two sessions run one after the other; the first also pays for compiling, tuning and capturing ("cold"), the second finds
that done ("warm"), as sessions after `Avatar.warm_up` do. A session is opened with a picture; then sound arrives block
by block, always in time: the times are of work, not of waiting. Once in a session the condition is made anew
(`Resink`): that block's time is in the metric `resink_seconds`, not among the steady ones.

`latency_seconds` is from the end of the piece of sound that completes a block to its frames, in the steady state, when
sound comes as it is spoken: the work of a block, and a block's length (or its work, if that is more) for each piece
that must come first, because speech features look ahead or, in the variant "batched", several blocks are on their way.

A third session says where the time goes, stage by stage (`stages.py`), in `metrics`: "opening/VAE encode", "first
block/denoise", "filling block/...", "re-sink block/condition", "steady block/VAE decode", ..., mean seconds of a block.
".../other" is what no stage counts, such as the frames' way to the host.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..runtime.avatar import Avatar
from ..runtime.placement.base import Placement
from ..runtime.placement.batched_steps import BatchedSteps
from ..runtime.placement.captured import CapturedBlock
from ..runtime.placement.engines import SinglePlacement
from ..runtime.placement.static_stream import StaticStream
from ..runtime.systems.liveavatar import LiveAvatarSystem
from ..runtime.systems.liveavatar_mode import AUDIO_RATE, GenerationMode, Resink
from .captured import captured_placement
from .harness.report import Result
from .harness.run import Bench
from .harness.timing import Timing
from .models import ModelChoice
from .stages import Stages
from .variants import running

VARIANTS = ("eager", "compiled", "fused", "kinora", "batched")
CAPTURED: dict[str, type[StaticStream]] = {"kinora": CapturedBlock, "batched": BatchedSteps}
STEADY_BLOCKS = 6  # timed in each session after its rolling caches are full
MOST_SILENT_FEEDS = 50  # blocks of sound without a frame, before something must be wrong


OPENING, FIRST, RESINK, STEADY = "opening", "first block", "re-sink block", "steady block"
FILLING = "filling block"  # until the rolling caches are full


@dataclass(frozen=True)
class Run:
    """One session: seconds by phase, of the opening and of each block; `late`: pieces of sound that followed a block's
    own before it came out, in the steady state."""

    seconds: dict[str, list[float]]
    late: int

    def mean(self, phase: str) -> float:
        return statistics.mean(self.seconds[phase])


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
    kind = CAPTURED.get(blank.variant)
    placement: Placement = SinglePlacement(system) if kind is None else captured_placement(system, kind)
    ahead = system.mode.steps - 1 if kind is BatchedSteps else 0
    avatar = Avatar(blank.name, system, placement)
    with running_sessions(blank.variant, system), bench.watching() as watch:
        cold, warm = (_run(avatar, size, seed, ahead) for seed in range(2))
        stages = by_stage(system, placement, size, ahead)
    timing, mode = Timing.of(cold.seconds[STEADY], warm.seconds[STEADY]), system.mode
    metrics = {
        "fps": mode.block_frames / timing.seconds,
        "latency_seconds": latency(warm.late, timing.seconds, mode.block_frames / mode.fps),
    }
    for name, run in (("cold", cold), ("warm", warm)):
        metrics[f"opening_seconds_{name}"] = run.mean(OPENING)
        metrics[f"first_frame_seconds_{name}"] = run.mean(FIRST)
    if RESINK in warm.seconds:
        metrics["resink_seconds"] = warm.mean(RESINK)
    metrics |= stages
    peak = None
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(bench.device)
        metrics["peak_reserved_bytes"] = float(torch.cuda.max_memory_reserved(bench.device))  # graphs' pools included
    return bench.rated(replace(blank, metrics=metrics, load=watch.load, peak_memory=peak), timing)


@contextmanager
def running_sessions(variant: str, system: LiveAvatarSystem) -> Iterator[None]:
    """As `running`; the captured variants need nothing around them."""
    if variant in CAPTURED:
        yield
        return
    with running(variant, system.dit, system.vae):
        yield


def latency(late: int, work: float, length: float) -> float:
    """Seconds from a block's last piece of sound to its frames: `late` further pieces of `length` seconds come first;
    each block takes `work` seconds."""
    return late * max(work, length) + work


def by_stage(system: LiveAvatarSystem, placement: Placement, size: tuple[int, int], ahead: int = 0) -> dict[str, float]:
    """Mean seconds of every stage of an opening and of a block of every kind, and of what is in no stage; `ahead`: as
    in `phase_of`."""
    stages = Stages(system.dit.device)
    avatar = Avatar("stages", stages.system(system), stages.placement(placement))
    run = _run(avatar, size, 2, ahead, enter=lambda phase: setattr(stages, "phase", phase))
    found: dict[str, float] = {}
    for phase in run.seconds:
        inside = {stage: seconds for (within, stage), seconds in stages.seconds.items() if within == phase}
        inside["other"] = sum(run.seconds[phase]) - sum(inside.values())
        found |= {f"{phase}/{stage}": seconds / len(run.seconds[phase]) for stage, seconds in inside.items()}
    return found


def filling_blocks(system: LiveAvatarSystem) -> int:
    """Blocks until the rolling caches are full."""
    return (system.mode.cache_latents or system.dit.config.cache_frames) // system.mode.block_latents


def phase_of(block: int, mode: GenerationMode, filling: int, ahead: int = 0) -> str:
    """What the block that comes out of a session is; `filling`: blocks that the rolling caches hold; `ahead`: how many
    blocks later the one is that goes in at the same time, which may be the first under a new condition."""
    if block == 0:
        return FIRST
    if block + ahead == mode.clip_blocks and mode.resink is not Resink.NEVER:
        return RESINK
    return FILLING if block < filling else STEADY


def _run(
    avatar: Avatar, size: tuple[int, int], seed: int, ahead: int, enter: Callable[[str], None] = lambda phase: None
) -> Run:
    """Open a session, fill its caches, time its steady blocks; tells which phase it is about to `enter`.

    RuntimeError when no frames come.
    """
    system, mode = avatar.system, avatar.mode
    samples, filling = mode.block_frames * mode.samples_per_frame, filling_blocks(system)
    sound = voice(samples * (filling + 1 + STEADY_BLOCKS + MOST_SILENT_FEEDS), seed)
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    enter(OPENING)
    started = time.perf_counter()
    session = avatar.stream(picture, seed=seed, size=size)
    _finish(system)
    seconds[OPENING].append(time.perf_counter() - started)
    block, waited = 0, 0.0
    with session:
        for number, piece in enumerate(sound.reshape(-1, samples)):
            phase = phase_of(block, mode, filling, ahead)
            enter(phase)
            started = time.perf_counter()
            frames = session.feed(piece)  # returns when the frames are on the CPU
            waited += time.perf_counter() - started
            if not len(frames):
                continue
            seconds[phase].append(waited)
            if len(seconds[STEADY]) == STEADY_BLOCKS:
                return Run(dict(seconds), number - block)
            block, waited = block + 1, 0.0
    raise RuntimeError(f"{len(sound) / AUDIO_RATE:.0f} s of sound gave only {block} blocks")


def _finish(system: LiveAvatarSystem) -> None:
    if system.dit.device.type == "cuda":
        torch.cuda.synchronize(system.dit.device)


def voice(samples: int, seed: int) -> np.ndarray:
    """Noise in syllables, float32 [samples]: as loud and as uneven as speech, for which speed does not care further."""
    noise = np.random.default_rng(seed).standard_normal(samples)
    syllables = np.sin(np.arange(samples) * (2 * np.pi * 4 / AUDIO_RATE)) ** 2
    return (0.1 * noise * syllables).astype(np.float32)
