"""`torchao.quantize_` on a loaded model: an alternative to our own FP8 layers, and a variant of `kinora bench step`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_doubles import FAST, pretend_limits
from kinora.bench import step as bench_step
from kinora.bench.commands import main
from kinora.bench.harness.report import Report
from kinora.bench.models import drawn, inference
from kinora.bench.peers import torchao_fp8
from kinora.bench.state import BlockCase, StepCall
from kinora.graphs.backend import kinora
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.graphs.quantize import quantize_linears, takes_fp8
from kinora.runtime import load
from kinora.runtime.systems.liveavatar import LiveAvatarSystem
from kinora.runtime.systems.liveavatar_mode import STREAM
from small_model import write_model
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
    assert swapped == ours, "the same layers as ours"
    error = (step_of(avatar.system) - expected).norm() / expected.norm()
    assert 0 < error < 2e-2
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(255, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
    sound = 0.1 * torch.randn(8_000, generator=generator).numpy()
    assert avatar.generate(picture, sound).frames.shape == (13, 64, 64, 3)


@torch.no_grad()
def test_fp8_keeps_rows_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audio's padding token is one; without a lower bound its scale is 0 and the whole flow NaN."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # torchao refuses a CPU, although PyTorch's product of scaled rows runs there
    monkeypatch.setattr(quantization.quant_api, "_check_hardware_support", lambda granularity: None)
    config = LiveAvatarConfig(
        dim=64,
        ffn_dim=128,
        num_heads=2,
        num_layers=2,
        text_dim=32,
        text_len=16,
        audio_dim=32,
        audio_layers=3,
        audio_inject_layers=(0,),
    )
    with drawn(torch.bfloat16, device):
        dit = inference(LiveAvatar(config))
    padded: list[Tensor] = []
    keys = dit.audio_injector.injector[0].k
    keys.register_forward_pre_hook(lambda module, inputs: padded.append(inputs[0].abs().amax(-1)))
    mode = replace(STREAM, steps=1)

    def flow() -> Tensor:
        call = StepCall.prepare(BlockCase.random(dit, mode, (4, 4)))
        return call(call.case.noises[0]).float()

    expected = flow()
    assert bool((padded[0] == 0).any()), "the case that this test is about"
    quantization.quantize_(dit, torchao_fp8(), filter_fn=takes_fp8)
    assert type(keys.weight).__name__ == "Float8Tensor"
    error = (flow() - expected).norm() / expected.norm()
    assert 0 < error < 0.15


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


@torch.no_grad()
def test_the_compiler_backend_keeps_quantised_weights(recwarn: pytest.WarningsRecorder) -> None:
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(2, 3, 32)
    to_int8(model)
    found = torch.compile(model, backend=kinora, dynamic=False)(x)
    assert torch.allclose(found, model(x)) and not [w for w in recwarn if "as it is" in str(w.message)]
