"""How long a call takes: median over repeats, measured twice so that the report knows its own run-to-run spread.

A *sample* runs every given call once (the same work on different inputs, so that the L2 cache of the GPU does not
hold them all) and is divided by their number. On a GPU samples lie between CUDA events on the current stream, on a
CPU between readings of the wall clock.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

WARM_SAMPLES = 3  # as many in a row must agree
WARM_AGREEMENT = 0.05  # relative difference of the slowest and the fastest of them
MOST_WARM_UPS = 20
SLEEP_CYCLES_PER_SECOND = 2e9  # `torch.cuda._sleep` counts GPU cycles; clocks of current GPUs are a little below


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of all `samples`, and of each of two runs. `steady`: warm-up found agreement."""

    seconds: float
    runs: tuple[float, float]
    samples: int
    steady: bool

    @property
    def spread(self) -> float:
        """Relative difference between the two runs' medians."""
        return abs(self.runs[0] - self.runs[1]) / min(self.runs)

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float], steady: bool = True) -> "Timing":
        """From the samples of two runs, in seconds."""
        medians = statistics.median(first), statistics.median(second)
        return cls(statistics.median((*first, *second)), medians, len(first) + len(second), steady)


@dataclass(frozen=True)
class Timer:
    """Times calls on `device`; each of the two runs takes about `run_seconds`, within the bounds on samples.

    `queue_ahead` puts a GPU sleep before the samples, so that the host has launched everything before the first one
    starts: then short kernels are timed without launch overhead, as they run inside a CUDA graph. Without it a call
    that launches too slowly shows it.
    """

    device: torch.device
    run_seconds: float = 0.5
    fewest: int = 3
    most: int = 100
    queue_ahead: bool = False

    def __call__(self, calls: Sequence[Call]) -> Timing:
        """ValueError when there is nothing to call."""
        if not calls:
            raise ValueError("there is nothing to time; pass at least one call")
        steady, seconds, launch = self._warm_up(calls)
        count = min(max(round(self.run_seconds / max(seconds * len(calls), 1e-9)), self.fewest), self.most)
        first, second = (self._samples(calls, count, launch) for _ in range(2))
        return Timing.of(first, second, steady)

    def _warm_up(self, calls: Sequence[Call]) -> tuple[bool, float, float]:
        """Run until the last samples agree: (they do, seconds a call, seconds that the host needs for a sample)."""
        self._samples(calls, 1, 0.0)  # compiles, tunes and allocates
        seen: list[float] = []
        steady, launch = False, 0.0
        while not steady and len(seen) < MOST_WARM_UPS:
            if self.queue_ahead:
                launch = _wall(calls)
            seen += self._samples(calls, 1, 0.0)
            last = seen[-WARM_SAMPLES:]
            steady = len(last) == WARM_SAMPLES and max(last) <= (1 + WARM_AGREEMENT) * min(last)
        return steady, statistics.median(seen[-WARM_SAMPLES:]), launch

    def _samples(self, calls: Sequence[Call], count: int, launch: float) -> list[float]:
        """Seconds of a call in each of `count` samples."""
        if self.device.type != "cuda":
            return [_wall(calls) / len(calls) for _ in range(count)]
        with torch.cuda.device(self.device):
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            torch.cuda.synchronize()
            if self.queue_ahead and launch:
                torch.cuda._sleep(int(min(1.2 * launch * count, 0.5) * SLEEP_CYCLES_PER_SECOND))
            for start, end in pairs:
                start.record()
                for call in calls:
                    call()
                end.record()
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1e3 / len(calls) for start, end in pairs]


def _wall(calls: Sequence[Call]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def replayed(calls: Sequence[Call], replays: int = 30) -> float:
    """Median seconds of one call, from replays of a CUDA graph that makes all of them, as a stream runs them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(replays + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times) / len(calls)
