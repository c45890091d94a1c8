"""`torchao.quantize_` on a loaded model: an alternative to our own FP8 layers, and a variant of `kinora bench step`."""

from pathlib import Path

import pytest
import torch
from bench_doubles import FAST, pretend_limits
from kinora.bench import step as bench_step
from kinora.bench.commands import main
from kinora.bench.harness.report import Report
from kinora.bench.state import BlockCase, StepCall
from kinora.graphs.quantize import quantize_linears, takes_fp8
from kinora.runtime import load
from kinora.runtime.systems.liveavatar import LiveAvatarSystem
from test_avatar import write_model
from torch import Tensor, nn

quantization = pytest.importorskip("torchao.quantization")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("torchao") / "small"))


def to_int8(model: nn.Module) -> None:
    """Weights in eight bits, which any CPU multiplies; FP8 takes a GPU."""
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=takes_fp8)


def step_of(system: LiveAvatarSystem) -> Tensor:
    assert system.size is not None
    call = StepCall.prepare(BlockCase.of(system, system.size))
    return call(call.case.noises[0])


@torch.no_grad()
def test_a_loaded_model_runs_quantised(folder: str) -> None:
    avatar = load(folder, device="cpu")
    expected = step_of(avatar.system)
    named = dict(avatar.system.dit.named_modules())
    ours = set(quantize_linears(load(folder, device="cpu").system.dit))
    to_int8(avatar.system.dit)
    swapped = {name for name, module in named.items() if type(getattr(module, "weight", None)).__name__ == "Int8Tensor"}
    assert swapped and swapped <= ours, "the same layers as ours, but for sides that FP8 does not multiply"
    error = (step_of(avatar.system) - expected).norm() / expected.norm()
    assert 0 < error < 2e-2
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(255, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
    sound = 0.1 * torch.randn(8_000, generator=generator).numpy()
    assert avatar.generate(picture, sound).frames.shape == (13, 64, 64, 3)


def test_the_compiler_says_that_it_wants_plain_weights(folder: str) -> None:
    from kinora.runtime.placement.captured import CapturedBlock

    system = load(folder, device="cpu").system
    assert system.size is not None
    to_int8(system.dit)
    case = BlockCase.of(system, system.size)
    with pytest.raises(TypeError, match=r"is a Int8Tensor; the compiler rewrites plain tensors only"):
        block = case.open(CapturedBlock(case.dit, case.prompt, case.mode, case.grid), filled=False)
        block.denoise(case.noises[0], case.inputs(0))


def test_it_is_measured_beside_ours(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_limits(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiling takes longer than all the rest
    words = ["step", "--model", folder, "--precision", "fp8", "--variant", "eager,torchao", *FAST, "--no-plot"]
    if not torch.cuda.is_available():
        assert main([*words, "-o", str(tmp_path / "cpu.json")]) == 0
        assert Report.load(tmp_path / "cpu.json").results[1].status == "unavailable"
    monkeypatch.setattr(bench_step, "quantize_by_torchao", to_int8)
    assert main([*words, "-o", str(tmp_path / "step.json")]) == 0
    ours, theirs = Report.load(tmp_path / "step.json").results
    assert theirs.variant == "torchao" and theirs.seconds and theirs.flops == ours.flops
    assert theirs.error and ours.error and theirs.error < ours.error, "eight bits of int8 lose less than e4m3"
