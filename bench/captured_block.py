"""`python -m kinora.bench.captured_block`: the captured block alone, with its kernels, where only PyTorch is installed.

The harness (`kinora bench step`, `block`) compares variants and checks results; this script needs only PyTorch and
Triton, builds LiveAvatar 14B with random weights, runs blocks until the rings are full and times whole blocks with CUDA
events. `--batched` times ticks of the steps of consecutive blocks in one forward instead: one block goes in and one
comes out a tick. `--decode` adds the captured decoder, in the same graph memory, to time and memory. `--check` compares
the first blocks with the plain steps of the same (quantised) model. Seconds and gigabytes are told stage by stage, and
the prefill of a new condition, as the re-sink in the middle of a stream does it, is timed too.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..graphs import capture
from ..graphs.capture import Pool, shared_pool
from ..graphs.models.liveavatar import LIVEAVATAR_14B
from ..graphs.models.liveavatar_memory import RingFormat
from ..graphs.models.wan_vae import DecoderState, WanVae
from ..runtime.placement.batched_steps import BatchedSteps
from ..runtime.placement.captured import CapturedBlock
from ..runtime.placement.captured_vae import CapturedDecoder
from ..runtime.placement.single import SingleDevice
from ..runtime.placement.static_stream import StaticStream
from .models import PUBLISHED, PUBLISHED_SIZE, ModelChoice
from .state import BlockCase, release
from .variants import running

CONFIGS = {
    "14b": LIVEAVATAR_14B,
    "1.3b": replace(
        LIVEAVATAR_14B,
        dim=1536,
        ffn_dim=8960,
        num_heads=12,
        num_layers=30,
        audio_inject_layers=LIVEAVATAR_14B.audio_inject_layers[:8],
    ),
}
"""LiveAvatar, and the same graph at the size of Wan 1.3B, where kernels are short."""
FILL = 6  # blocks until the rings are full, and one more
FRAMES = 12  # of a block


class Stages:
    """Seconds and memory of what comes before the first block."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.started = self.last = time.perf_counter()

    def done(self, stage: str) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        gigabytes = {"allocated_gb": torch.cuda.memory_allocated(), "reserved_gb": torch.cuda.memory_reserved()}
        row = {"stage": stage, "seconds": round(now - self.last, 2)}
        self.rows.append(row | {name: round(value / 1e9, 2) for name, value in gigabytes.items()})
        self.last = now

    @property
    def seconds(self) -> float:
        return round(self.last - self.started, 1)


def time_calls(call: Callable[[int], object], first: int, count: int) -> list[float]:
    """Milliseconds of `call(i)` for `count` numbers from `first` on, sorted."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(count):
        begin.record()
        call(first + i)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)


def spread(times: list[float]) -> dict[str, float]:
    return {"median": times[len(times) // 2], "min": times[0], "max": times[-1]}


def kernels(call: Callable[[int], object], number: int, steps: int, top: int = 24) -> list[dict[str, Any]]:
    """The kernels of `call(number)` by time: milliseconds and launches a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call(number)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: e.self_device_time_total, reverse=True)[:top]
    return [
        {"kernel": e.key, "ms": e.self_device_time_total / 1000 / steps, "launches": e.count / steps} for e in events
    ]


def condition_again(block: StaticStream, case: BlockCase) -> dict[str, Any]:
    """Milliseconds of a new condition, what its passes matched, and its kernels."""
    times = time_calls(lambda _: block.condition(case.reference, case.motion), 0, 8)
    return {
        "condition_ms": spread(times),
        "condition_captured": block.prefill.replay.graph is not None,
        "condition_passes": {r.name: r.matches for r in block.prefill.compile().reports},
        "kernels_of_a_condition": kernels(lambda _: block.condition(case.reference, case.motion), 0, 1),
    }


def check(case: BlockCase, made: list[Tensor]) -> list[float]:
    """Relative L2 error of the first blocks against the plain steps, bfloat16 caches."""
    plain, errors = SingleDevice(case.dit, case.prompt, case.mode, case.grid), []
    with running("eager", case.dit):
        plain.condition(case.reference, case.motion)
        for i, found in enumerate(made[:2]):
            wanted = plain.denoise(case.noises[i % 2], case.inputs(i)).float()
            errors.append(float((found.float() - wanted).norm() / wanted.norm()))
    return errors


def decode_beside(vae: WanVae, case: BlockCase, latents: int, denoising: float, pool: Pool | None) -> dict[str, Any]:
    """Milliseconds of the decode of a block, and frames per second of `denoising` ms and it together."""
    decoder, state = CapturedDecoder(vae, case.grid, latents, pool), DecoderState()
    given = case.noises[0].float()
    for _ in range(3):
        decoder.decode_stream(given, state)
    times = time_calls(lambda _: decoder.decode_stream(given, state), 0, 10)
    median = times[len(times) // 2]
    return {"decode_ms": spread(times), "fps": 1000 * FRAMES / (denoising + median)}


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.captured_block", description=__doc__.split("\n\n")[0])
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="fp8")
    parser.add_argument("--config", choices=CONFIGS, default="14b", help="size of the transformer")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--ring", choices=("auto", "plain", "fp8", "mixed", "joined"), default="auto", help="how caches are kept"
    )
    parser.add_argument("--batched", action="store_true", help="the steps of consecutive blocks in one forward")
    parser.add_argument("--decode", action="store_true", help="with the captured VAE decoder")
    parser.add_argument("--decoded", type=int, default=3, help="latent frames that the decoder takes at once")
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--separate-clears", action="store_true", help="library kernels keep the memset before each of them"
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("captured_block: no GPU is visible", file=sys.stderr)
        return 2
    capture.JOIN_CLEARS = not args.separate_clears
    stages = Stages()
    choice = ModelChoice(PUBLISHED, args.precision, torch.device("cuda"), config=CONFIGS[args.config])
    system = choice.build()
    choice.quantize(system.dit)
    torch.cuda.empty_cache()
    stages.done("weights")
    case = BlockCase.of(replace(system, mode=replace(system.mode, steps=args.steps)), PUBLISHED_SIZE)
    formats = {"auto": None, "plain": RingFormat(torch.bfloat16)}
    ring = formats[args.ring] if args.ring in formats else RingFormat(torch.bfloat16, args.ring)
    kind: type[StaticStream] = BatchedSteps if args.batched else CapturedBlock
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    ready = Stages()
    pool = shared_pool(case.dit.device)
    block = kind(case.dit, case.prompt, case.mode, case.grid, ring=ring, pool=pool)
    ready.done("static buffers")
    program = block.compile()
    ready.done("trace and passes")
    block.prefill.compile()
    ready.done("trace and passes of the condition")
    block.record()
    ready.done("kernels compiled, graph recorded")
    block.condition(case.reference, case.motion)
    ready.done("condition")

    def run(i: int) -> Tensor | None:
        return block.denoise(case.noises[i % 2], case.inputs(i))

    finished = [run(0)]
    ready.done("first block")
    torch.cuda.empty_cache()
    ahead = args.steps - 1 if args.batched else 0
    finished += [run(i) for i in range(1, FILL + ahead)]
    made = [latents for latents in finished if latents is not None]
    times = time_calls(run, FILL + ahead, 8)
    median, unit = times[len(times) // 2], "tick" if args.batched else "block"
    recording = block.replay.graph
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m kinora.bench.captured_block " + " ".join(argv if argv is not None else sys.argv[1:]),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "captured": recording is not None,
        "joined_clears": len(recording.counters or ()) if recording else 0,
        "stages": stages.rows + ready.rows,
        "seconds_to_ready": ready.seconds,
        f"{unit}_ms": spread(times),
        "step_ms": median / args.steps,
        "latency_ms": median * (args.steps if args.batched else 1),
        "fps_without_decoder": 1000 * FRAMES / median,
        "passes": {r.name: r.matches for r in program.reports},
        "kernels_of_a_step": kernels(run, FILL + ahead + 8, args.steps),
    }
    report |= condition_again(block, case)
    if args.decode:
        report |= decode_beside(system.vae, case, args.decoded, median, pool)
    torch.cuda.empty_cache()
    report["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    report["reserved_gb"] = torch.cuda.memory_reserved() / 1e9
    _write(report, args.out)
    if args.check:
        del block, run, program, pool, recording  # the plain steps want the memory of the rings
        release()
        report["relative_l2_of_blocks"] = check(case, made)
        _write(report, args.out)
    print(json.dumps(report, indent=1))
    return 0


def _write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
