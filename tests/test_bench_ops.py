"""`kinora bench op`: every declared op is found and checked before it is timed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_doubles import CPU, FAST, bench_at, broken, double, inputs, op, pretend_limits, wrong
from kinora.bench import ops as bench_ops
from kinora.bench.commands import main
from kinora.bench.harness import run as run_module
from kinora.bench.harness.report import Report
from kinora.bench.harness.timing import Timing
from kinora.kernels import cases as kernel_cases
from kinora.kernels import registry as registry_module
from kinora.kernels.cases import Case, Op
from torch import Tensor


def overwrite(x: Tensor, out: Tensor) -> Tensor:
    out.copy_(x)
    return x + 1


def lazy(x: Tensor, out: Tensor) -> Tensor:
    return x + 1


def inputs_with_output(device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    return inputs(device, generator) | {"out": torch.zeros(4, 8, device=device)}


@pytest.fixture
def some_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Case("tiny", inputs_with_output, 32, 256, small=True)]
    found = [op("right", double), op("wrong", wrong), op("broken", broken)]
    found.append(Op("writes", overwrite, overwrite, lambda: both, mutates=("out",)))
    found.append(Op("forgets", lazy, overwrite, lambda: both, mutates=("out",)))
    monkeypatch.setattr(bench_ops, "registry", lambda: {one.name: one for one in found})


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_limits(monkeypatch)


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
