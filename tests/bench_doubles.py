"""Ops, variants and limits that stand for the real ones in tests of the benchmark harness."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kinora.bench.harness import run as run_module
from kinora.bench.harness.nvml import GpuMonitor
from kinora.bench.harness.report import Report
from kinora.bench.harness.roofline import Roofline
from kinora.bench.harness.run import Bench, Ready
from kinora.kernels.cases import Case, Op, randn
from torch import Tensor

CPU = torch.device("cpu")
FAST = ["--device", "cpu", "--seconds", "0.001"]
LIMITS = Roofline({"float32": 1e9, "bf16": 2e9}, 1e8)


def double(x: Tensor) -> Tensor:
    return x * 2


def wrong(x: Tensor) -> Tensor:
    return x * 2.1


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nfor this")


def inputs(device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": randn(4, 8, device=device, generator=generator)}


def op(name: str, run: Callable[..., Tensor]) -> Op:
    return Op(name, run, double, lambda: [Case("tiny", inputs, 32, 256, small=True), Case("real", inputs, 64, 512)])


def pretend_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of the machine without measuring them."""
    monkeypatch.setattr(run_module.roofline, "measure", lambda device, seconds: LIMITS)


def bench_at(path: Path, monitor: GpuMonitor | None = None) -> Bench:
    bench = Bench(CPU, Report.begin("test", CPU), path, monitor, run_seconds=1e-4)
    bench.report.roofline = LIMITS
    return bench


class Way:
    """A variant that is ready with one call; notes that it was left."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call, self.left = call, False

    def __call__(self) -> "Way":
        return self

    def __enter__(self) -> Ready:
        return Ready([self.call], self.call)

    def __exit__(self, *_: object) -> None:
        self.left = True
