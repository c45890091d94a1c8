"""One run of a benchmark: every measurement is checked, timed beside the limits of this machine, and saved at once."""

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import roofline
from .check import Check, relative_l2
from .nvml import GpuMonitor, Watch
from .profile import kernel_shares
from .report import Report, Result, Status
from .timing import Call, Timer, Timing

T = TypeVar("T")


class Unavailable(Exception):
    """This machine or this build does not have what a variant needs; the message says what."""


@dataclass(frozen=True)
class Work:
    """What a call must do at least: FLOPs, bytes through memory, and the precision whose limit counts."""

    flops: float
    bytes: float
    precision: str


@dataclass(frozen=True)
class Expected:
    """The reference's result, and the relative L2 error allowed against it."""

    result: Any
    tolerance: float


@dataclass(frozen=True)
class Ready:
    """A variant that is ready to run: `calls` do the same work on different inputs, `result` gives what is compared."""

    calls: Sequence[Call]
    result: Callable[[], Any]


Way = Callable[[], AbstractContextManager[Ready]]
"""Sets a variant up, keeps it so for the duration, and takes it down again."""


@dataclass
class Bench:
    """Where measurements go. `monitor`: None without NVML; `profiling`: keep each call's kernels as well."""

    device: torch.device
    report: Report
    out: Path
    monitor: GpuMonitor | None = None
    run_seconds: float = 0.5
    profiling: bool = False
    say: Callable[[str], None] = field(default=lambda line: None)

    @classmethod
    def begin(
        cls,
        command: str,
        device: torch.device,
        out: Path,
        *,
        run_seconds: float = 0.5,
        profiling: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> "Bench":
        """Look at the machine and measure its limits."""
        monitor = GpuMonitor.open(device)
        bench = cls(device, Report.begin(command, device, monitor), out, monitor, run_seconds, profiling, say)
        bench.report.save(out)  # a path that cannot be written is told now, not after the measurements
        say("measuring the limits of this machine")
        bench.report.roofline = roofline.measure(device, run_seconds)
        return bench

    def measure(
        self,
        name: str,
        variant: str,
        way: Way,
        work: Work,
        expected: Expected | None = None,
        *,
        queue_ahead: bool = False,
        note: str = "",
        metrics: Callable[[float], dict[str, float]] = lambda seconds: {},
    ) -> Result:
        """Check and time one variant; errors become a result that says so. `metrics` of the seconds of a call."""
        self.say(f"{name}: {variant}")
        blank = Result(name, variant, "ok", note, flops=work.flops, bytes=work.bytes, precision=work.precision)
        try:
            with torch.no_grad(), way() as ready:
                timer = Timer(self.device, self.run_seconds, queue_ahead=queue_ahead)
                result = self._timed(blank, ready, expected, timer)
            if result.seconds:
                result = replace(result, metrics=metrics(result.seconds))
        except Unavailable as reason:
            result = _without_time(blank, "unavailable", str(reason))
        except Exception as error:  # of any part of a variant, such as memory or a compiler: the others still count
            result = _without_time(blank, "failed", _told(error))
        self.add(result)
        _free(self.device)
        return result

    def attempt(self, name: str, variant: str, make: Callable[[], T]) -> T | None:
        """What `make` gives; None when it fails, with a result that says why."""
        try:
            return make()
        except Unavailable as reason:
            self.add(Result(name, variant, "unavailable", str(reason)))
        except Exception as error:  # as in `measure`
            self.add(Result(name, variant, "failed", _told(error)))
        return None

    def add(self, result: Result) -> None:
        """Keep a result and save the report, so that a run that is cut off loses nothing."""
        self.report.results.append(result)
        self.report.save(self.out)
        if result.status != "ok":
            self.say(f"  {result.status}: {result.note}")

    def watching(self) -> AbstractContextManager[Watch]:
        """Clocks and power until the block ends; an empty watch without NVML."""
        return self.monitor.watch() if self.monitor else nullcontext(Watch())

    def _timed(self, blank: Result, ready: Ready, expected: Expected | None, timer: Timer) -> Result:
        result = blank
        if expected is not None:
            check = Check(relative_l2(ready.result(), expected.result), expected.tolerance)
            error = check.error if math.isfinite(check.error) else None  # JSON has no infinity
            result = replace(blank, error=error, tolerance=check.tolerance)
            if not check.passed:
                return _without_time(result, "refused", f"wrong result: {check}")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.watching() as watch:
            timing = timer(ready.calls)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        profile = kernel_shares(ready.calls[0], self.device) if self.profiling else ()
        return self.rated(replace(result, peak_memory=peak, load=watch.load, profile=profile), timing)

    def rated(self, result: Result, timing: Timing) -> Result:
        """The result with its time, and what that means at the limits of this machine."""
        limits = self.report.roofline
        least = limits.seconds(result.flops, result.bytes, result.precision) if limits else None
        return replace(
            result,
            seconds=timing.seconds,
            spread=timing.spread,
            samples=timing.samples,
            flops_per_second=result.flops / timing.seconds if result.flops else None,
            bytes_per_second=result.bytes / timing.seconds if result.bytes else None,
            roofline_seconds=least,
            roofline_share=least / timing.seconds if least else None,
            note=", ".join(filter(None, (result.note, "" if timing.steady else "warm-up did not settle"))),
        )


def _without_time(result: Result, status: Status, note: str) -> Result:
    return replace(result, status=status, note=note)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
