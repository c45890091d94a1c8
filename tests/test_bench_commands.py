"""The commands of `kinora bench` on a CPU: what they write, and that bad input is one clear line.

Times are never asserted, only that there is one, or none.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_doubles import FAST, pretend_limits
from kinora.bench import step as step_module
from kinora.bench.commands import main
from kinora.bench.harness.report import Report
from kinora.bench.harness.run import Unavailable
from kinora.bench.stream import by_stage, filling_blocks, latency, phase_of
from kinora.bench.variants import compiled, running
from kinora.bench.work import decode_flops, step_flops
from kinora.graphs.models.liveavatar import LIVEAVATAR_14B
from kinora.graphs.models.wan_vae import WAN21_VAE
from kinora.runtime import load
from kinora.runtime.cli import main as kinora
from kinora.runtime.placement.batched_steps import BatchedSteps
from kinora.runtime.placement.engines import CapturedPlacement, SinglePlacement
from kinora.runtime.systems.liveavatar_mode import STREAM, Resink
from small_model import write_model
from torch import nn


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_limits(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("bench") / "small"))


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


def test_show_prints_what_a_run_that_was_cut_off_has_saved(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "step.json"

    @contextmanager
    def cut_off(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(step_module, "_captured", cut_off)
    words = ["step", "--model", model, "--variant", "eager,kinora", "-o", str(out), *FAST, "--no-plot"]
    assert main(words) != 0
    capsys.readouterr()
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "48 tokens" in shown and "eager" in shown and "kinora" not in shown
    assert main(["show", str(tmp_path / "none.json")]) == 2


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
    assert (
        main(["stream", "--model", model, "--variant", "eager,kinora,batched", "--device", "cpu", "-o", str(out)]) == 0
    )
    eager, *captured = Report.load(out).results
    assert [result.status for result in captured] == ["unavailable"] * 2
    assert eager.seconds and eager.samples == 12 and math.isclose(eager.metrics["fps"], 12 / eager.seconds)
    assert eager.metrics["latency_seconds"] >= eager.seconds
    for what in ("opening", "first_frame"):
        assert eager.metrics[f"{what}_seconds_cold"] > 0 and eager.metrics[f"{what}_seconds_warm"] > 0
    for stage in ("opening/VAE encode", "opening/condition", "first block/denoise", "first block/audio features"):
        assert eager.metrics[stage] > 0
    for phase in ("opening", "first block", "filling block", "steady block"):
        assert eager.metrics[f"{phase}/other"] >= 0
    assert "steady block/VAE decode" in eager.metrics and "filling block/denoise" in eager.metrics
    assert "resink_seconds" not in eager.metrics, "this model never makes its condition anew"
    assert {name.split("/")[1] for name in eager.metrics if name.startswith("steady block/")} == {
        "audio features",
        "denoise",
        "VAE decode",
        "other",
    }


def test_the_block_of_the_resink_is_none_of_the_steady_ones(model: str) -> None:
    system = load(model, device="cpu").system
    filling = filling_blocks(system)
    system = replace(system, mode=replace(system.mode, resink=Resink.REFERENCE, clip_blocks=filling + 2))
    metrics = by_stage(system, SinglePlacement(system), (64, 64))
    assert metrics["re-sink block/condition"] > 0 and metrics["re-sink block/denoise"] > 0
    assert metrics["opening/condition"] > 0 and "steady block/condition" not in metrics
    phases = [phase_of(block, system.mode, filling) for block in range(filling + 4)]
    filled = ["steady block", "steady block", "re-sink block", "steady block"]
    assert phases == ["first block", *["filling block"] * (filling - 1), *filled]


def test_a_batched_session_has_its_phases_where_blocks_go_in(model: str) -> None:
    """The block that comes out is three behind the one that goes in, with which the condition is made anew."""
    system = load(model, device="cpu").system
    system = replace(system, mode=replace(system.mode, resink=Resink.REFERENCE, clip_blocks=5))
    metrics = by_stage(system, CapturedPlacement(system, BatchedSteps), (64, 64), ahead=system.mode.steps - 1)
    assert metrics["re-sink block/condition"] > 0 and metrics["opening/condition"] > 0
    assert not {"first block/condition", "filling block/condition", "steady block/condition"} & metrics.keys()
    phases = [phase_of(block, system.mode, 4, ahead=3) for block in range(6)]
    assert phases == ["first block", "filling block", "re-sink block", "filling block", "steady block", "steady block"]


def test_latency_counts_the_sound_that_must_come_first() -> None:
    assert latency(0, 0.4, 0.48) == 0.4
    assert math.isclose(latency(3, 0.4, 0.48), 3 * 0.48 + 0.4)
    assert math.isclose(latency(3, 0.5, 0.48), 4 * 0.5)


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
    variants = "kinora,batched" if command == "stream" else "kinora"
    assert main([command, "--model", model, "--variant", variants, "-o", str(out), *fast]) == 0
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


WITHOUT_PYAV = """
import sys
sys.modules["av"] = None  # as where PyAV is not installed: importing it raises ImportError
from kinora.bench.harness import roofline
from kinora.bench.harness.roofline import Roofline
roofline.measure = lambda device, seconds: Roofline({"float32": 1e9}, 1e8)
from kinora.bench.commands import main
command, model, folder = sys.argv[1:]
words = [command, "--variant", "eager", "--device", "cpu", "-o", f"{folder}/a.json"]
words += ["adaln"] if command == "op" else ["--model", model]
words += [] if command == "stream" else ["--seconds", "0.001", "--no-plot"]
sys.exit(main(words))
"""


@pytest.mark.parametrize("command", ["op", "step", "block", "vae", "stream"])
def test_benchmarks_run_without_pyav(command: str, model: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", WITHOUT_PYAV, command, model, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(result.seconds for result in Report.load(tmp_path / "a.json").results)
