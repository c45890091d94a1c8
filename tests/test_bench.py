"""The benchmark harness: what is refused, what a report holds, how two of them compare, and every command on a CPU.

Times are never asserted, only that there is one, or none.
"""

import io
import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kinora.bench import ops as bench_ops
from kinora.bench.commands import main
from kinora.bench.harness import run as run_module
from kinora.bench.harness.check import relative_l2
from kinora.bench.harness.nvml import GpuMonitor
from kinora.bench.harness.profile import kernel_shares
from kinora.bench.harness.report import Report, Result
from kinora.bench.harness.roofline import Roofline
from kinora.bench.harness.run import Bench, Expected, Ready, Unavailable, Work
from kinora.bench.harness.table import moves, print_report
from kinora.bench.harness.timing import Timer, Timing
from kinora.bench.variants import compiled, running
from kinora.bench.work import decode_flops, step_flops
from kinora.graphs.models.liveavatar import LIVEAVATAR_14B
from kinora.graphs.models.wan_vae import WAN21_VAE
from kinora.kernels import cases as kernel_cases
from kinora.kernels import registry as registry_module
from kinora.kernels.cases import Case, Op, randn
from kinora.runtime.cli import main as kinora
from kinora.runtime.errors import InputError
from kinora.runtime.systems.liveavatar_mode import STREAM
from rich.console import Console
from test_avatar import write_model
from torch import Tensor, nn

CPU = torch.device("cpu")
FAST = ["--device", "cpu", "--seconds", "0.001"]
LIMITS = Roofline({"float32": 1e9, "bf16": 2e9}, 1e8)


def double(x: Tensor) -> Tensor:
    return x * 2


def wrong(x: Tensor) -> Tensor:
    return x * 2.1


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nfor this")


def overwrite(x: Tensor, out: Tensor) -> Tensor:
    out.copy_(x)
    return x + 1


def lazy(x: Tensor, out: Tensor) -> Tensor:
    return x + 1


def inputs(device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": randn(4, 8, device=device, generator=generator)}


def inputs_with_output(device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    return inputs(device, generator) | {"out": torch.zeros(4, 8, device=device)}


def op(name: str, run: Callable[..., Tensor]) -> Op:
    return Op(name, run, double, lambda: [Case("tiny", inputs, 32, 256, small=True), Case("real", inputs, 64, 512)])


@pytest.fixture
def some_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Case("tiny", inputs_with_output, 32, 256, small=True)]
    found = [op("right", double), op("wrong", wrong), op("broken", broken)]
    found.append(Op("writes", overwrite, overwrite, lambda: both, mutates=("out",)))
    found.append(Op("forgets", lazy, overwrite, lambda: both, mutates=("out",)))
    monkeypatch.setattr(bench_ops, "registry", lambda: {one.name: one for one in found})


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module.roofline, "measure", lambda device, seconds: LIMITS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("bench") / "small"))


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


# The parts


def test_timer_runs_every_call_in_two_runs() -> None:
    counts = [0, 0]

    def call(index: int) -> None:
        counts[index] += 1

    timing = Timer(CPU, 1e-6, fewest=4, most=4)([lambda: call(0), lambda: call(1)])
    assert timing.samples == 8 and counts[0] == counts[1] >= 8
    assert timing.seconds > 0 and timing.spread >= 0
    with pytest.raises(ValueError, match="nothing to time"):
        Timer(CPU)([])


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


def test_work_of_the_published_model() -> None:
    """Against the formulas: projections, feed-forward, attention to 15,312 keys and 512 text tokens, and audio."""
    c, tokens, keys = LIVEAVATAR_14B, 3168, 15_312
    layer = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + 4 * tokens * c.dim * (keys + c.text_len)
    audio = len(c.audio_inject_layers) * (2 * tokens * 2 * c.dim**2 + 4 * tokens * c.dim * 5)
    assert math.isclose(step_flops(c, STREAM, (88, 48)), c.num_layers * layer + audio, rel_tol=1e-3)
    assert 20e12 < decode_flops(WAN21_VAE, 3, 7, (88, 48)) < 35e12


def test_compiled_modules_are_themselves_again() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyError), compiled([layer]):
        assert "forward" in vars(layer)
        raise KeyError
    assert "forward" not in vars(layer)


def test_fused_is_unavailable_without_triton() -> None:
    with pytest.raises(Unavailable, match="Triton"), running("fused", vae=nn.Linear(1, 1)):  # type: ignore[arg-type]
        pass


# Ops


def test_registry_collects_ops_and_refuses_a_name_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def declare(*modules: SimpleNamespace) -> None:
        names = [SimpleNamespace(name=module.__name__.rpartition(".")[2]) for module in modules]
        monkeypatch.setattr(registry_module.pkgutil, "iter_modules", lambda path: names)
        known = {f".{name.name}": module for name, module in zip(names, modules, strict=True)}
        real = registry_module.import_module
        monkeypatch.setattr(registry_module, "import_module", lambda name, *rest: known.get(name) or real(name, *rest))
        registry_module.registry.cache_clear()

    first, second, third = op("b", double), op("a", double), op("c", double)
    one = SimpleNamespace(__name__="k.one", OP=first, FP8_OP=third, launch=double)
    declare(one, SimpleNamespace(__name__="k.two", OP=second, imported=first), kernel_cases)
    assert dict(registry_module.registry()) == {"a": second, "b": first, "c": third}
    declare(SimpleNamespace(__name__="k.one", OP=first), SimpleNamespace(__name__="k.two", OP=op("b", wrong)))
    with pytest.raises(ValueError, match=r"'b' is declared by k\.one and by k\.two"):
        registry_module.registry()
    registry_module.registry.cache_clear()


def test_every_declared_op_passes_its_check_on_small_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Timer", lambda *_, **__: lambda calls: Timing.of([1.0], [1.0]))
    monkeypatch.setattr(run_module, "_free", lambda device: None)  # collecting garbage takes longer than the ops
    bench = bench_at(tmp_path / "ops.json")
    bench_ops.bench_ops(bench, [], ["eager"], small=True)
    assert {"adaln_fp8", "attention_fp8", "gelu_quantize_rows", "store_values_fp8"} <= set(registry_module.registry())
    assert [r for r in bench.report.results if r.status != "ok"] == []


def test_a_check_tells_right_from_wrong() -> None:
    case = Case("tiny", inputs, small=True)
    assert bench_ops.check_case(op("right", double), case, CPU).passed
    found = bench_ops.check_case(op("wrong", wrong), case, CPU)
    assert not found.passed and found.error == pytest.approx(0.05)
    unwritten = Op("unwritten", torch.empty_like, double, lambda: [case])
    assert bench_ops.check_case(unwritten, case, CPU).error == float("inf")


def test_an_op_that_is_wrong_is_refused(some_ops: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ops.json"
    assert main(["op", "--variant", "eager,kinora", "-o", str(out), *FAST, "--no-plot"]) == 1
    report = Report.load(out)
    states = {(r.name, r.variant): r.status for r in report.results}
    assert states == {
        ("right/tiny", "eager"): "ok",
        ("right/tiny", "kinora"): "ok",
        ("wrong/tiny", "eager"): "ok",
        ("wrong/tiny", "kinora"): "refused",
        ("broken/tiny", "eager"): "ok",
        ("broken/tiny", "kinora"): "failed",
        ("writes/tiny", "eager"): "ok",
        ("writes/tiny", "kinora"): "ok",
        ("forgets/tiny", "eager"): "ok",
        ("forgets/tiny", "kinora"): "refused",
    }
    assert all((r.seconds is None) == (r.status != "ok") for r in report.results)
    shown = capsys.readouterr()
    assert "REFUSED" in shown.out and "only ratios" in shown.out
    assert "3 of 10 results have no time" in shown.err


def test_report_schema_and_plot(some_ops: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "ops.json"
    arguments = ["op", "right", "--real", "--profile", "--variant", "eager", "-o", str(out), *FAST]
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["schema"] == 1 and found["device"]["type"] == "cpu" and found["versions"]["torch"]
    assert found["command"].startswith("kinora bench op") and found["roofline"]["flops_per_second"]["float32"] == 1e9
    result = found["results"][0]
    assert (result["name"], result["flops"], result["bytes"]) == ("right/real", 64, 512)
    assert {"seconds", "spread", "samples", "roofline_share", "error", "tolerance", "profile"} <= result.keys()
    assert result["profile"][0]["share"] > 0
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_inputs_are_copied_with_their_views() -> None:
    base = torch.randn(4, 6)
    copied = bench_ops.clone({"k": base[:, :3], "v": base[:, 3:], "n": 2})
    assert copied["k"].stride() == (6, 1) and copied["n"] == 2
    assert copied["k"].untyped_storage().data_ptr() == copied["v"].untyped_storage().data_ptr()
    assert copied["k"].untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    assert bench_ops.input_bytes(copied) == base.nbytes


def test_precision_follows_the_inputs() -> None:
    case = Case("x", inputs, 1, 1)
    eight, half = torch.zeros(1).to(torch.float8_e4m3fn), torch.zeros(1, dtype=torch.bfloat16)
    assert bench_ops.work_of(case, {"w": eight, "x": half}).precision == "fp8"
    assert bench_ops.work_of(case, {"list": [half], "y": torch.zeros(1)}).precision == "bf16"
    wide = bench_ops.widened({"x": half, "w": eight})
    assert wide["x"].dtype == torch.float32 and wide["w"].dtype == torch.float8_e4m3fn


# Comparison


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


# The commands


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["op", "no_such_op"], "there is no op no_such_op"),
        (["op", "--variant", "best"], "there is no variant best"),
        (["step", "--model", "no-such-model", "--device", "cpu"], "no-such-model"),
        (["step", "--device", "cpu"], "liveavatar-14b takes a GPU"),
        (["step", "--model", "tiny", "--precision", "int4"], "precision 'int4'"),
        (["vae", "--model", "tiny", "--size", "100x64"], "multiples of 16"),
        (["block", "--model", "tiny", "--size", "wide"], "is no size"),
        (["op", "--seconds", "0"], "--seconds is 0"),
        (["op", "--fast"], "--fast"),
        (["measure"], "measure"),
        (["compare", "a.json", "b.json"], "a.json cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for program, name in ((main, "kinora bench"), (lambda words: kinora(["bench", *words]), "kinora")):
        assert program(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith(f"{name}: ") and told in lines[-1]
        assert all("measuring the limits" in line for line in lines[:-1])


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


def test_the_program_reaches_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert kinora(["--help"]) == 0
    assert "bench" in capsys.readouterr().out
    assert kinora(["bench", "step", "--help"]) == 0
    assert "rolling cache" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8"])
def test_step(model: str, precision: str, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    words = ["step", "--model", model, "--precision", precision, "--variant", "eager,fused,kinora", "-o", str(out)]
    assert main([*words, *FAST, "--no-plot"]) == 0
    eager, fused, captured = Report.load(out).results
    assert eager.seconds and eager.flops and eager.bytes and eager.error is not None
    assert (eager.error > 0) == (precision == "fp8")
    assert fused.status == captured.status == "unavailable" and fused.note and captured.note


def test_vae(model: str, tmp_path: Path) -> None:
    out = tmp_path / "vae.json"
    assert main(["vae", "--model", model, "--variant", "eager", "-o", str(out), *FAST, "--no-plot"]) == 0
    decode, encode = Report.load(out).results
    assert decode.name.startswith("decode/") and encode.name.startswith("encode/")
    assert decode.seconds and decode.error == 0 and encode.error == 0
    assert math.isclose(decode.metrics["fps"], 12 / decode.seconds)


def test_block(model: str, tmp_path: Path) -> None:
    out = tmp_path / "block.json"
    words = ["block", "--model", model, "--variant", "eager,kinora", "--size", "96x64", "-o", str(out)]
    assert main([*words, *FAST, "--no-plot"]) == 0
    eager, captured = Report.load(out).results
    assert "96x64, 4 steps" in eager.name and captured.status == "unavailable"
    assert eager.seconds and math.isclose(eager.metrics["fps"], 12 / eager.seconds) and eager.error == 0


def test_stream(model: str, tmp_path: Path) -> None:
    out = tmp_path / "stream.json"
    assert main(["stream", "--model", model, "--variant", "eager,kinora", "--device", "cpu", "-o", str(out)]) == 0
    eager, captured = Report.load(out).results
    assert captured.status == "unavailable"
    assert eager.seconds and eager.samples == 12 and math.isclose(eager.metrics["fps"], 12 / eager.seconds)
    for what in ("opening", "first_frame"):
        assert eager.metrics[f"{what}_seconds_cold"] > 0 and eager.metrics[f"{what}_seconds_warm"] > 0
    for stage in ("opening/VAE encode", "opening/condition", "first block/denoise", "first block/audio features"):
        assert eager.metrics[stage] > 0
    steady = sum(seconds for name, seconds in eager.metrics.items() if name.startswith("steady block/"))
    assert "steady block/VAE decode" in eager.metrics and "steady block/condition" not in eager.metrics
    assert steady > 0


@pytest.mark.parametrize(
    "command", ["step", *(pytest.param(c, marks=pytest.mark.slow) for c in ("block", "vae", "stream"))]
)
def test_the_captured_variant_is_right(
    model: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs run call by call here; the numbers of a CPU say nothing, so the command itself refuses."""
    monkeypatch.setattr("kinora.bench.captured.need_gpu", lambda *_: None)
    out = tmp_path / "captured.json"
    fast = [*FAST, "--no-plot"] if command != "stream" else ["--device", "cpu"]
    assert main([command, "--model", model, "--variant", "kinora", "-o", str(out), *fast]) == 0
    for result in Report.load(out).results:
        assert result.status == "ok" and result.seconds


def test_diffusers_peer(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiling takes longer than all the rest
    out = tmp_path / "step.json"
    assert main(["step", "--model", model, "--variant", "diffusers", "-o", str(out), *FAST, "--no-plot"]) == 0
    (result,) = Report.load(out).results
    assert result.seconds and result.flops and "no rolling cache" in result.note


@pytest.mark.slow
def test_compiled_variants_agree(model: str, tmp_path: Path) -> None:
    out = tmp_path / "block.json"
    assert main(["block", "--model", model, "--variant", "eager,compiled", "-o", str(out), *FAST, "--no-plot"]) == 0
    assert all(result.seconds for result in Report.load(out).results)
