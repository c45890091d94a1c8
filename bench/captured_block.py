"""`python -m kinora.bench.captured_block`: the captured block alone, with its kernels, where only PyTorch is installed.

The harness (`kinora bench step`, `block`) compares variants and checks results; this script needs only PyTorch and
Triton, builds LiveAvatar 14B with random weights, runs blocks until the rings are full and times whole blocks with CUDA
events. `--check` compares the first blocks with the plain steps of the same (quantised) model.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..graphs.models.liveavatar_memory import RingFormat
from ..runtime.placement.captured import CapturedBlock
from ..runtime.placement.single import SingleDevice
from .models import PUBLISHED, PUBLISHED_SIZE, ModelChoice
from .state import BlockCase
from .variants import running

FILL = 6  # blocks until the rings are full, and one more


def time_blocks(block: CapturedBlock, case: BlockCase, count: int) -> list[float]:
    """Milliseconds of `count` blocks, sorted."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(count):
        begin.record()
        block.denoise(case.noises[i % 2], case.inputs(FILL + i))
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)


def kernels(block: CapturedBlock, case: BlockCase, top: int = 24) -> list[dict[str, Any]]:
    """The kernels of one block by time: milliseconds and launches a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        block.denoise(case.noises[0], case.inputs(FILL))
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: e.self_device_time_total, reverse=True)[:top]
    steps = case.mode.steps
    return [
        {"kernel": e.key, "ms": e.self_device_time_total / 1000 / steps, "launches": e.count / steps} for e in events
    ]


def check(case: BlockCase, made: list[torch.Tensor]) -> list[float]:
    """Relative L2 error of the first blocks against the plain steps, bfloat16 caches."""
    plain, errors = SingleDevice(case.dit, case.prompt, case.mode, case.grid), []
    with running("eager", case.dit):
        plain.condition(case.reference, case.motion)
        for i, found in enumerate(made[:2]):
            wanted = plain.denoise(case.noises[i % 2], case.inputs(i)).float()
            errors.append(float((found.float() - wanted).norm() / wanted.norm()))
    return errors


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.captured_block", description=__doc__.split("\n\n")[0])
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="fp8")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ring", choices=("auto", "plain", "fp8", "mixed"), default="auto", help="how caches are kept")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("captured_block: no GPU is visible", file=sys.stderr)
        return 2
    choice = ModelChoice(PUBLISHED, args.precision, torch.device("cuda"))
    system = choice.build()
    choice.quantize(system.dit)
    torch.cuda.empty_cache()
    case = BlockCase.of(replace(system, mode=replace(system.mode, steps=args.steps)), PUBLISHED_SIZE)
    formats = {"auto": None, "plain": RingFormat(torch.bfloat16)}
    ring = formats[args.ring] if args.ring in formats else RingFormat(torch.bfloat16, args.ring)
    started = time.perf_counter()
    block = CapturedBlock(case.dit, case.prompt, case.mode, case.grid, ring=ring)
    block.condition(case.reference, case.motion)
    made = [block.denoise(case.noises[0], case.inputs(0))]
    torch.cuda.synchronize()
    ready = time.perf_counter() - started
    made += [block.denoise(case.noises[i % 2], case.inputs(i)) for i in range(1, FILL)]
    times = time_blocks(block, case, 8)
    assert block.program is not None
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m kinora.bench.captured_block " + " ".join(argv if argv is not None else sys.argv[1:]),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "captured": block.replay.graph is not None,
        "seconds_to_ready": round(ready, 1),
        "block_ms": {"median": times[len(times) // 2], "min": times[0], "max": times[-1]},
        "step_ms": times[len(times) // 2] / args.steps,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "passes": {r.name: r.matches for r in block.program.reports},
        "kernels_of_a_step": kernels(block, case),
    }
    if args.check:
        report["relative_l2_of_blocks"] = check(case, made)
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
