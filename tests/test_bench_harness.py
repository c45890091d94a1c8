"""The benchmark harness: what is refused, what a report holds, how two of them compare.

Times are never asserted, only that there is one, or none.
"""

import io
import math
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_doubles import CPU, LIMITS, Way, bench_at, broken
from kinora.bench.commands import main
from kinora.bench.harness.check import relative_l2
from kinora.bench.harness.nvml import GpuMonitor
from kinora.bench.harness.profile import kernel_shares
from kinora.bench.harness.report import Report, Result
from kinora.bench.harness.run import Expected, Unavailable, Work
from kinora.bench.harness.table import moves, print_report
from kinora.bench.harness.timing import Timer, Timing
from kinora.runtime.errors import InputError
from rich.console import Console
from torch import Tensor


def test_timer_runs_every_call_in_two_runs() -> None:
    counts = [0, 0]

    def call(index: int) -> None:
        counts[index] += 1

    timing = Timer(CPU, 1e-6, fewest=4, most=4)([lambda: call(0), lambda: call(1)])
    assert timing.samples == 8 and counts[0] == counts[1] >= 8
    assert timing.seconds > 0 and timing.spread >= 0
    with pytest.raises(ValueError, match="nothing to time"):
        Timer(CPU)([])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_sample_is_divided_by_its_calls(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock, or events, that only the calls move: one of 2 s and one of 4 s take 3 s each."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool):
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    cuda = SimpleNamespace(Event=Event, device=nullcontext, synchronize=lambda: None)
    monkeypatch.setattr("kinora.bench.harness.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("kinora.bench.harness.timing.torch", SimpleNamespace(cuda=cuda))

    def call(seconds: float) -> None:
        now[0] += seconds

    timing = Timer(torch.device(kind), 1e-6)([lambda: call(2.0), lambda: call(4.0)])
    assert timing.seconds == 3.0 and timing.runs == (3.0, 3.0) and timing.steady


def test_timing_is_the_median_and_its_spread_that_of_the_runs() -> None:
    timing = Timing.of([1.0, 2.0, 9.0], [2.2, 2.2, 0.1])
    assert timing.runs == (2.0, 2.2) and timing.seconds == 2.1
    assert math.isclose(timing.spread, 0.1)


def test_relative_error_sees_nested_results_and_what_is_not_finite() -> None:
    a, b = torch.ones(4), torch.full((4,), 1.1)
    assert math.isclose(relative_l2((a, [b]), (a, [a])), 0.1, rel_tol=1e-5)
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0 and relative_l2(a, torch.zeros(4)) == math.inf
    assert relative_l2(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf
    with pytest.raises(ValueError, match=r"\(4,\) and, of the reference, \(2,\)"):
        relative_l2(a, a[:2])


def test_roofline_is_the_slower_of_the_two_limits() -> None:
    assert LIMITS.seconds(2e9, 1e7, "float32") == 2.0 and LIMITS.seconds(1e6, 1e8, "bf16") == 1.0
    assert LIMITS.seconds(1e6, 1e8, "fp8") is None and LIMITS.seconds(0, 0, "bf16") is None


def test_wrong_results_and_errors_get_no_time(tmp_path: Path) -> None:
    bench, work = bench_at(tmp_path / "a.json"), Work(1e6, 1e5, "float32")
    good, bad = Way(lambda: torch.ones(3)), Way(lambda: torch.ones(3) * 1.5)
    expected = Expected(torch.ones(3), 1e-3)
    ok = bench.measure("x", "eager", good, work, expected, metrics=lambda seconds: {"fps": 12 / seconds})
    assert ok.seconds and ok.error == 0 and ok.metrics["fps"] == 12 / ok.seconds
    assert ok.roofline_share and math.isclose(ok.roofline_share, 1e-3 / ok.seconds)
    assert math.isclose(ok.flops_per_second or 0, 1e6 / ok.seconds)
    refused = bench.measure("x", "fused", bad, work, expected)
    assert refused.status == "refused" and refused.seconds is None and math.isclose(refused.error or 0, 0.5)
    assert good.left and bad.left

    def absent() -> Way:
        raise Unavailable("there is no such library")

    assert bench.measure("x", "peer", absent, work).status == "unavailable"
    infinite = bench.measure("x", "fused", Way(lambda: torch.ones(3) / 0), work, expected)
    assert infinite.status == "refused" and infinite.error is None and "inf" in infinite.note
    failed = bench.measure("x", "kinora", Way(lambda: broken(torch.ones(1))), work, expected)
    assert failed.status == "failed" and failed.note == "RuntimeError: no kernel for this"
    assert Report.load(tmp_path / "a.json") == bench.report, "the report is saved after every result"


class FakeNvml:
    """A GPU that is hot and at its power cap in every other reading."""

    def __init__(self) -> None:
        self.readings = 0
        self.enough = threading.Event()

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {0: 1200, 2: 3201}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 699_000

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        if self.readings == 1:
            self.readings += 1
            raise RuntimeError("lost")
        return 84

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self.readings += 1
        if self.readings >= 8:
            self.enough.set()
        return 0x04 if self.readings % 2 else 0x01


def test_a_throttled_run_says_so(tmp_path: Path) -> None:
    nvml = FakeNvml()
    bench = bench_at(tmp_path / "a.json", GpuMonitor(nvml, "gpu", interval=1e-4))

    def call() -> Tensor:
        nvml.enough.wait(5)
        return torch.ones(1)

    result = bench.measure("x", "eager", Way(call), Work(0, 0, "float32"))
    assert result.load and (result.load.clock_mhz, result.load.memory_clock_mhz) == (1200, 3201)
    assert result.load.power_watts == 699 and result.load.temperature_c == 84
    assert set(result.load.throttled) == {"power cap"} and 0 < result.load.throttled["power cap"] < 1
    shown = io.StringIO()
    print_report(bench.report, Console(width=200, file=shown))
    assert "THROTTLED: power cap" in shown.getvalue()
    assert Report.load(tmp_path / "a.json").results[0] == result


def test_no_monitor_without_a_gpu() -> None:
    assert GpuMonitor.open(CPU) is None


def test_profile_shares_sum_to_one() -> None:
    x = torch.randn(64, 64)
    shares = kernel_shares(lambda: (x @ x).relu(), CPU)
    assert math.isclose(sum(part.share for part in shares), 1.0, rel_tol=1e-6)
    assert any(part.kernel == "aten::mm" and part.calls == 1 for part in shares)


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    for text in (
        "no json",
        "[]",
        '{"schema": 99}',
        '{"schema": 1}',
        '{"schema": 1, "roofline": null, "results": [{}]}',
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match="no report of kinora bench"):
            Report.load(tmp_path / "a.json")


def test_a_number_that_is_not_finite_does_not_lose_the_report(tmp_path: Path) -> None:
    metrics = {"fps": math.inf, "frames": 12.0}
    report_with(Result("x", "eager", "ok", spread=math.nan, metrics=metrics)).save(tmp_path / "a.json")
    (found,) = Report.load(tmp_path / "a.json").results
    assert found == Result("x", "eager", "ok", metrics={"frames": 12.0})


def test_a_report_that_is_cut_off_while_it_is_saved_keeps_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    report_with(Result("x", "eager", "ok", seconds=1.0)).save(path)
    kept = path.read_text()

    def stop(self: Path, text: str) -> None:
        self.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", stop)
        report_with().save(path)
    assert path.read_text() == kept
    report_with().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def report_with(*results: Result) -> Report:
    return replace_results(Report.begin("test", CPU), *results)


def replace_results(report: Report, *results: Result) -> Report:
    return replace(report, results=list(results))


def test_compare_sorts_and_flags_beyond_the_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def timed(name: str, seconds: float, spread: float = 0.0) -> Result:
        return Result(name, "eager", "ok", seconds=seconds, spread=spread)

    before = report_with(timed("same", 1.0), timed("fast", 1.0), timed("noisy", 1.0, 0.3), timed("gone", 1.0))
    after = report_with(timed("same", 1.01), timed("fast", 0.5), timed("noisy", 1.2), timed("new", 1.0))
    found = moves(before, after)
    assert [(m.name, m.flagged) for m in found] == [("fast", True), ("noisy", False), ("same", False)]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    before.save(paths[0])
    after.save(paths[1])
    assert main(["compare", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "faster" in shown and "0.500" in shown and "only in A: gone, eager" in shown and "only in B: new" in shown
    report_with(timed("other", 1.0)).save(paths[1])
    assert main(["compare", *map(str, paths)]) == 2
