"""Exported functions: what they compute, that nothing of ours is left in them, packages, and the C++ program."""

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import left
from kinora.graphs.export import Part, package, trace_decode
from kinora.graphs.lowering import Lowered
from kinora.graphs.models.liveavatar import RollingCache, ref_shift
from kinora.graphs.models.wan_vae import DecoderState, VaeConfig, WanVae
from kinora.kernels import row_norm, rows
from kinora.kernels.launch import flattened, traced_launches
from kinora.kernels.registry import registry
from kinora.runtime import load
from kinora.runtime.cli import main
from kinora.runtime.errors import InputError, OutputError
from kinora.runtime.export import PreparedStream, export, prepare, tolerance, traced
from kinora.runtime.faces import draw_portrait
from kinora.runtime.systems.liveavatar import LiveAvatarSystem
from kinora.runtime.systems.liveavatar_mode import Decoding
from small_model import SIDE, write_model
from torch import Tensor

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp"
LAUNCHING = (
    "adaln",
    "audio_residual",
    "channel_norm_silu",
    "gated_residual",
    "qk_norm_rope",
    "quantize_rows",
    "qkv_norm_rope",
    "residual_norm",
    "rope_attention",
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> LiveAvatarSystem:
    return load(write_model(tmp_path_factory.mktemp("model")), device="cpu").system


@pytest.fixture(scope="module")
def stream(system: LiveAvatarSystem) -> PreparedStream:
    samples = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    return prepare(system, np.asarray(draw_portrait(3)), samples, (SIDE, SIDE), blocks=2)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# Launches


@pytest.mark.parametrize("name", LAUNCHING)
def test_a_traced_launch_runs_the_same_kernel(
    name: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, made = registry()[name], []

    def noting(*arguments: Any) -> Any:
        made.append(flattened(*arguments))
        return made[-1]

    monkeypatch.setattr("kinora.kernels.launch.flattened", noting)
    for case in op.cases():
        if not case.small:
            continue
        given = [dict(case.inputs(kernel_device, torch.Generator().manual_seed(0))) for _ in range(2)]
        plain = op.run(**given[0])
        with traced_launches():
            through = op.run(**given[1])
        written = [[inputs[key] for key in op.mutates] for inputs in given]
        for a, b in zip(_tensors([plain, written[0]]), _tensors([through, written[1]]), strict=True):
            assert torch.equal(a.float().nan_to_num(), b.float().nan_to_num()), case.name
    assert made


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [t for part in value for t in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def test_launches_that_differ_in_numbers_share_a_kernel() -> None:

    arguments = dict.fromkeys(row_norm._forward.arg_names, 0) | {"x": torch.zeros(2), "y": None, "eps": 1e-6, "DIM": 8}
    one, values = flattened(row_norm._forward, arguments | {"length": 16, "SUM": rows.triton_dtype(torch.bfloat16)})
    two, others = flattened(row_norm._forward, arguments | {"length": 32, "SUM": rows.triton_dtype(torch.bfloat16)})
    assert one is two
    assert [v for v in values.values() if v is not arguments["x"]].count(16) == 1
    assert [v for v in others.values() if v is not arguments["x"]].count(32) == 1
    assert flattened(row_norm._forward, arguments | {"DIM": 16, "length": 16})[0] is not one
    with pytest.raises(TypeError, match=r"argument rows is .*takes tensors and numbers"):
        flattened(row_norm._forward, arguments | {"rows": object()})


TRACED = """
import sys
import triton
from triton.backends.compiler import GPUTarget


class Hopper:  # what Triton compiles for; no device is touched
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Hopper())
import numpy as np
import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from kinora.graphs.lowering import Lowered
from kinora.kernels import dispatch
from kinora.runtime import load
from kinora.runtime.export import prepare, traced
from kinora.runtime.faces import draw_portrait

system = load(sys.argv[1], precision="bfloat16", device="cpu").system
stream = prepare(system, np.asarray(draw_portrait(0)), np.ones(9, np.float32), (64, 64), blocks=1)
dispatch.interpreting = lambda: True  # as on a GPU: every op launches its kernel
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
for part in ("step", "decode"):
    found = traced(system, stream, part)
    exported = torch.export.export(Lowered(found.program.module), tuple(found.inputs.values()), strict=False)
    exported = exported.run_decompositions()
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    launches = [node for node in calls if "triton_kernel_wrapper" in str(node.target)]
    print(part, "ours", sum("kinora" in str(node.target) for node in calls))
    print(part, "launches", len(launches))
    print(part, "mutated", *sorted(exported.graph_signature.user_inputs_to_mutate.values()))
    done = set()
    for node in launches:
        given, kernel, options = node.kwargs["kwargs"], kernel_side_table.get_kernel(node.kwargs["kernel_idx"]), {}
        while not isinstance(kernel, triton.JITFunction):
            options, kernel = {"num_warps": kernel.configs[0].num_warps}, kernel.fn
        name = kernel.fn.__name__
        print(part, "writes", name, *node.kwargs["tensors_to_clone"])
        if name not in done:
            types = {key: "i32" if isinstance(v, int) else POINTERS[v.meta["val"].dtype] for key, v in given.items()}
            source = triton.compiler.ASTSource(kernel, {key: types[key] for key in kernel.arg_names}, {}, {})
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            print(part, "compiled", len(compiled.asm["cubin"]))
        done.add(name)
"""


def test_on_a_gpu_the_graph_holds_launches_of_our_kernels(tmp_path: Path) -> None:
    """In a process of its own, where kernels are not for the interpreter; compiled for Hopper, not run."""
    command = [sys.executable, "-c", textwrap.dedent(TRACED), write_model(tmp_path / "model")]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert "step ours 0" in lines and "decode ours 0" in lines
    launches = {words[0]: int(words[2]) for words in map(str.split, lines) if words[1] == "launches"}
    assert launches["step"] > 10 and launches["decode"] > 5
    mutated = next(line for line in lines if line.startswith("step mutated")).split()[2:]
    assert len(mutated) == 4  # k and v of the rings of two layers
    assert len(next(line for line in lines if line.startswith("decode mutated")).split()) == 2
    written = [words[3:] for words in map(str.split, lines) if words[1] == "writes"]
    assert all(1 <= len(names) <= 3 for names in written)  # never "every tensor", which would copy weights
    assert [len(names) for names in written].count(3) == 2  # queries and both rings, once a layer
    assert all(int(line.split()[2]) > 1000 for line in lines if " compiled " in line)


# Without a compiler: the lowered functions


def test_the_lowered_step_equals_the_model(system: LiveAvatarSystem, stream: PreparedStream) -> None:
    """Over growing and rolling rings; the rings end up alike."""
    dit, part = system.dit, traced(system, stream, "step")
    function, inputs = Lowered(part.program.module), part.inputs
    tokens = dit.config.num_frames_per_block * stream.condition.grid[0] * stream.condition.grid[1]
    cache = RollingCache.allocate(dit.config, tokens // dit.config.num_frames_per_block)
    for index in range(6):
        x, audio, t = torch.randn_like(inputs["x"]), torch.randn_like(inputs["audio"]), 900.0 - 100 * index
        wanted = dit.forward_block(
            x,
            dit.embed_time(torch.tensor([[t]])),
            stream.text,
            dit.encode_audio(audio),
            stream.condition,
            cache,
            3 * index,
            ref_shift(3 * index, 20),
        )
        changed = {
            "x": x,
            "audio": audio,
            "timestep": torch.tensor([t]),
            "block": torch.tensor([index]),
            "distance": torch.tensor([20]),
        }
        assert relative(function(*(inputs | changed).values()), wanted) < 1e-5
    rings = part.arguments["rings"]
    assert relative(torch.stack([ring.k for ring in rings]), cache.k) < 1e-5
    assert torch.equal(torch.stack([ring.v for ring in rings]) != 0, cache.v != 0)


def test_the_lowered_decode_equals_the_stream(system: LiveAvatarSystem, stream: PreparedStream) -> None:
    part = traced(system, stream, "decode")
    function, slots = Lowered(part.program.module), [slot.contiguous() for slot in stream.slots]
    for latents, wanted in zip(stream.latents, stream.frames, strict=True):
        frames, *slots = function(latents, *slots)
        assert relative(frames, wanted) < 1e-5
        assert all(slot.is_contiguous() for slot in slots)
    assert [tuple(slot.shape) for slot in slots] == [tuple(slot.shape) for slot in stream.slots]


@pytest.mark.parametrize("part", ["step", "decode"])
def test_an_exported_graph_holds_nothing_of_ours(system: LiveAvatarSystem, stream: PreparedStream, part: str) -> None:
    found = traced(system, stream, part)
    assert any("kinora" in str(node.target) for node in found.program.graph.nodes)
    exported = torch.export.export(Lowered(found.program.module), tuple(found.inputs.values()), strict=False)
    assert not [node for node in exported.graph.nodes if "kinora" in str(node.target)]


def test_metadata_name_every_tensor_in_order(system: LiveAvatarSystem, stream: PreparedStream) -> None:
    part = traced(system, stream, "step")
    lines = part.metadata["inputs"].splitlines()
    names = [line.split()[0] for line in lines]
    assert names[:6] == ["x", "timestep", "audio", "block", "distance", "text.0.k"]
    assert names[-2:] == ["rings.1.k", "rings.1.v"]
    assert lines[0] == "x float32 1 4 3 8 8" and lines[3] == "block int64 1"
    assert part.metadata["outputs"] == "flow float32 1 4 3 8 8"
    decode = traced(system, stream, "decode").metadata
    assert decode["outputs"].splitlines()[0] == "frames float32 1 3 12 64 64"
    assert [line.split()[0] for line in decode["outputs"].splitlines()[1:]] == [
        f"slots.{i}" for i in range(len(stream.slots))
    ]


def test_the_saved_stream_holds_what_the_packages_take(
    system: LiveAvatarSystem, stream: PreparedStream, tmp_path: Path
) -> None:
    stream.save(tmp_path / "stream.pt")
    saved = torch.load(tmp_path / "stream.pt", weights_only=True)
    assert all(tensor.is_contiguous() for tensor in saved.values())
    assert torch.equal(saved["noise"], stream.noise) and torch.equal(saved["text.1.v"], stream.text.layers[1].v)
    changing = {"x", "timestep", "audio", "block", "distance", "latents"}
    for part in ("step", "decode"):
        for name, tensor in traced(system, stream, part).inputs.items():
            if name not in changing and not name.startswith("rings."):
                assert saved[name].shape == tensor.shape and saved[name].dtype == tensor.dtype


def test_the_lowered_step_of_an_fp8_model(tmp_path: Path) -> None:
    """Its layers stay in FP8 and come close to the plain step; the limit is the widest."""
    system = load(write_model(tmp_path / "model"), precision="fp8", placement="single", device="cpu").system
    stream = prepare(system, np.asarray(draw_portrait(3)), np.ones(9, np.float32), (SIDE, SIDE), blocks=1)
    part = traced(system, stream, "step")
    assert sum("fp8_matmul" in str(node.target) for node in part.program.graph.nodes) > 10
    inputs = part.inputs | {"timestep": torch.tensor([700.0]), "distance": torch.tensor([9])}
    wanted = system.dit.forward_block(
        inputs["x"],
        system.dit.embed_time(torch.tensor([[700.0]])),
        stream.text,
        system.dit.encode_audio(inputs["audio"]),
        stream.condition,
        RollingCache.allocate(system.dit.config, 16, dtype=torch.bfloat16),
        0,
        0,
    )
    assert relative(Lowered(part.program.module)(*inputs.values()), wanted) < tolerance(system) == 1e-1


def test_what_cannot_be_exported_is_told(system: LiveAvatarSystem, stream: PreparedStream, tmp_path: Path) -> None:
    picture, sound = np.asarray(draw_portrait(0)), np.zeros(9, np.float32)
    with pytest.raises(InputError, match="5 blocks are no part of a clip; pass 1 to 4"):
        prepare(system, picture, sound, (SIDE, SIDE), blocks=5)
    with pytest.raises(InputError, match="the seed is -1"):
        prepare(system, picture, sound, (SIDE, SIDE), seed=-1)
    clips = replace(system, mode=replace(system.mode, decoding=Decoding.CLIP))
    with pytest.raises(InputError, match="decodes whole clips"):
        prepare(clips, picture, sound, (SIDE, SIDE))
    with pytest.raises(OutputError, match="is no folder"):
        export(system, stream, Path(__file__))
    (tmp_path / "step.pt2").mkdir()
    with pytest.raises(OutputError, match="cannot write into"):
        export(system, stream, tmp_path)
    with pytest.raises(ValueError, match="has not begun"):
        traced(system, replace(stream, slots=[]), "decode")
    with pytest.raises(ValueError, match="does not hold whole blocks of 48 tokens"):
        traced(system, replace(stream, ring_rows=100), "step")


# Packages


@torch.no_grad()
def test_a_package_decodes(tmp_path: Path) -> None:
    """A VAE of two levels, which compiles in seconds."""
    vae = WanVae(VaeConfig(4, 4, (1, 2), 1, (True,), (0.0,) * 4, (1.0,) * 4)).requires_grad_(False)
    state = DecoderState()
    vae.decode_stream(torch.randn(1, 4, 2, 4, 6), state)
    made = package(trace_decode(vae, torch.randn(1, 4, 3, 4, 6), state), tmp_path / "decode.unchecked.pt2")
    path = made.rename(tmp_path / "decode.pt2")  # as one that passed its check; it is then found by its new name
    run, slots = torch._inductor.aoti_load_package(str(path)), [slot.contiguous() for slot in state.slots]
    for _ in range(2):
        latents = torch.randn(1, 4, 3, 4, 6)
        frames, *slots = run(latents, *slots)
        assert relative(frames, vae.decode_stream(latents, state)) < 1e-5


def compiled(part: Part, path: Path) -> Path:
    path.write_text("compiled")
    return path


def breaks(*_: object) -> float:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("verify", "told"),
    [(lambda *_: float("nan"), "differs from PyTorch by nan"), (breaks, "does not run .no such kernel")],
    ids=["another result", "no result"],
)
def test_a_wrong_package_never_has_a_good_name(
    verify: Callable[..., float],
    told: str,
    system: LiveAvatarSystem,
    stream: PreparedStream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not while it is checked, not afterwards; and an older package does not stay beside the new stream."""
    seen = []

    def check(*given: Any) -> float:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        return verify(*given) if given[2] == "decode" else 0.0

    monkeypatch.setattr("kinora.runtime.export.package", compiled)
    monkeypatch.setattr("kinora.runtime.export.verify", check)
    (tmp_path / "decode.pt2").write_text("an older one")
    (tmp_path / "step.failed.pt2").write_text("an older one")
    with pytest.raises(OutputError, match=rf"{tmp_path}/decode.failed.pt2 {told}.*; do not use it") as caught:
        export(system, stream, tmp_path)
    assert isinstance(caught.value.__cause__, RuntimeError) == (verify is breaks)
    assert seen == [["step.unchecked.pt2", "stream.pt"], ["decode.unchecked.pt2", "step.pt2", "stream.pt"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.failed.pt2", "step.pt2", "stream.pt"]
    assert (tmp_path / "decode.failed.pt2").read_text() == "compiled"


def test_memory_that_ends_says_nothing_against_a_package(
    system: LiveAvatarSystem, stream: PreparedStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kinora.runtime.export.package", compiled)
    monkeypatch.setattr("kinora.runtime.export.verify", full)
    with pytest.raises(torch.OutOfMemoryError):
        export(system, stream, tmp_path, ("step",))
    assert left(tmp_path) == ["step.unchecked.pt2", "stream.pt"]


def test_one_part_leaves_no_older_package_of_the_other(
    system: LiveAvatarSystem, stream: PreparedStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be of another size than the stream that lies beside it now."""
    monkeypatch.setattr("kinora.runtime.export.package", compiled)
    monkeypatch.setattr("kinora.runtime.export.verify", lambda *_: 0.0)
    export(system, stream, tmp_path)
    assert left(tmp_path) == ["decode.pt2", "step.pt2", "stream.pt"]
    export(system, stream, tmp_path, ("step",))
    assert left(tmp_path) == ["step.pt2", "stream.pt"]


@pytest.mark.slow
def test_a_cpp_program_runs_tiny_as_pytorch_does(tmp_path: Path) -> None:
    """The commands of docs/export.md."""
    assert main(["export", "aoti", "tiny", "--device", "cpu", "-o", str(tmp_path / "tiny")]) == 0
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", tmp_path / "build", prefix], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
    program = tmp_path / "build" / "kinora_stream"
    run = subprocess.run([program, tmp_path / "tiny"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    errors = [float(found) for found in re.findall(r"relative error (\S+) ", run.stdout)]
    assert len(errors) == 2 and max(errors) < 1e-5

    strict = subprocess.run([program, tmp_path / "tiny", "cpu", "1e-12"], capture_output=True, check=False)
    assert strict.returncode == 1
    (tmp_path / "tiny" / "stream.pt").unlink()
    missing = subprocess.run([program, tmp_path / "tiny"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2 and "stream.pt cannot be read" in missing.stderr


# The command


def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step.pt2").touch()
    command = ["export", "aoti", "tiny", "-o", str(tmp_path)]
    assert main(command) == 2
    assert "step.pt2 exists; pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--part", "encode"]) == 2
    assert "'encode' is not one of 'step', 'decode', 'all'" in capsys.readouterr().err
    assert main([*command, "--part", "decode"]) == 2  # step.pt2 would not fit its stream, and go
    assert "step.pt2 exists; pass --overwrite" in capsys.readouterr().err
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert main([*command[:-1], str(tmp_path / "step.pt2")]) == 2
    assert "step.pt2 is no folder" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 2
    assert "there is no C++ compiler" in capsys.readouterr().err


def test_the_command_exports_one_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drawn face and a tone stand in for a picture and a voice that are not given."""
    made = {}

    def keep(part: Part, path: Path) -> Path:
        made[path.name] = part
        path.touch()
        return path

    monkeypatch.setattr("kinora.runtime.export.package", keep)
    monkeypatch.setattr("kinora.runtime.export.verify", lambda *_: 2e-7)
    model, out = str(write_model(tmp_path / "model")), tmp_path / "out"
    assert main(["export", "aoti", model, "--device", "cpu", "--part", "step", "--blocks", "3", "-o", str(out)]) == 0
    assert f"wrote {out}: step differs from PyTorch by 2.0e-07" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["step.pt2", "stream.pt"]
    assert made["step.unchecked.pt2"].inputs["x"].shape == (1, 4, 3, 8, 8)
    saved = torch.load(out / "stream.pt", weights_only=True)
    assert saved["noise"].shape[0] == 3 and saved["audio"].std() > 0
