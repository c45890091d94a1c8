"""Bundles of whole models: written whole or not at all, loaded bit for bit, verified, refused when they are damaged."""

import json
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kinora.checkpoints_tools.bundle import write as writing
from kinora.checkpoints_tools.bundle.device import cut, fill, scatter
from kinora.checkpoints_tools.bundle.format import BundleError, read_index
from kinora.checkpoints_tools.bundle.layout import PAD, execution_order
from kinora.checkpoints_tools.bundle.read import Bundle
from kinora.checkpoints_tools.bundle.verify import sqnr
from kinora.checkpoints_tools.bundle.write import write_bundle
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.graphs.quantize import Fp8Linear, quantize_linears
from kinora.runtime import Avatar, load
from kinora.runtime.bundles import export_bundle, open_bundle, schedule_tables, verify_bundle
from kinora.runtime.cli import main
from kinora.runtime.errors import CheckpointError, InputError, OutputError
from kinora.runtime.systems.liveavatar_step import DenoisingStep
from safetensors.torch import load_file
from test_avatar import write_model
from test_liveavatar_checkpoint import folder as published  # noqa: F401  (a fixture)
from test_liveavatar_checkpoint import small_text  # noqa: F401  (a fixture)
from torch import Tensor

VOICE = (0.1 * np.random.default_rng(1).standard_normal(8000)).astype(np.float32)
PICTURE = np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "small-fp8", precision="fp8", device="cpu")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def frames(avatar: Avatar, **options: object) -> np.ndarray:
    return avatar.configured(motion_frames=9).generate(PICTURE, VOICE, **options).frames  # type: ignore[arg-type]


def source(name: str | Path, precision: str, checkpoint: Path | None = None) -> Avatar:
    """The model as it is loaded without a bundle, with the recipe of a bundle of that precision.

    Its weights are copied to memory of their own: a file that is used where it is mapped has them at odd addresses, and
    some CPU kernels sum in another order there, which shows in the last bit.
    """
    kept = "float32" if precision == "float32" else "bfloat16"
    avatar = load(name, checkpoint=checkpoint, precision=kept, device="cpu")
    if precision == "fp8":
        quantize_linears(avatar.system.dit, granularity="row")
    for module in (avatar.system.dit, avatar.system.vae, getattr(avatar.system.audio_features, "front_end", None)):
        for tensor in () if module is None else (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
    return avatar


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# Loading


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_frames_are_those_of_the_source(precision: str, model: Path, tmp_path: Path) -> None:
    export_bundle(model, tmp_path / "b", precision=precision, device="cpu")
    ours, theirs = load(tmp_path / "b", device="cpu"), source(model, precision)
    assert (ours.name, ours.mode, ours.size) == ("b", theirs.mode, theirs.size)
    assert any(isinstance(m, Fp8Linear) for m in ours.system.dit.modules()) == (precision == "fp8")
    for mine, wanted in ((ours.system.dit, theirs.system.dit), (ours.system.vae, theirs.system.vae)):
        state = mine.state_dict()
        assert all(equal(state[key], value) for key, value in wanted.state_dict().items())
        assert not any(p.requires_grad for p in mine.parameters()) and not mine.training
    assert np.array_equal(frames(ours), frames(theirs))


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_the_published_layout_with_its_encoders(precision: str, published: Path, tmp_path: Path) -> None:  # noqa: F811
    name, options = "liveavatar-14b", {"steps": 1, "size": (64, 64), "prompt": "a person"}
    export_bundle(name, tmp_path / "b", checkpoint=published, precision=precision, device="cpu")
    shutil.copytree(tmp_path / "b", tmp_path / "moved")
    shutil.rmtree(tmp_path / "b")
    ours, theirs = load(tmp_path / "moved", device="cpu"), source(name, precision, published)
    made, wanted = frames(ours, **options), frames(theirs, **options)
    assert np.array_equal(made, wanted)
    assert not np.array_equal(made, frames(ours, **(options | {"prompt": "a"})))
    sources = {entry["path"] for entry in open_bundle(tmp_path / "moved").manifest["sources"]}
    assert {"config.json", "liveavatar.safetensors", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json"} <= sources
    assert not verify_bundle(tmp_path / "moved", source=name, checkpoint=published, device="cpu").problems


def test_one_prompt_instead_of_the_text_encoder(published: Path, tmp_path: Path) -> None:  # noqa: F811
    name, options = "liveavatar-14b", {"steps": 1, "size": (64, 64)}
    export_bundle(name, tmp_path / "b", checkpoint=published, prompt="a person", device="cpu")
    ours = load(tmp_path / "b", device="cpu")
    wanted = frames(source(name, "bfloat16", published), prompt="a person", **options)
    assert np.array_equal(frames(ours, **options), wanted)
    assert np.array_equal(frames(ours, prompt="a person", **options), wanted)
    with pytest.raises(InputError, match="exported with the prompt 'a person'"):
        frames(ours, prompt="a", **options)
    assert not (tmp_path / "b" / "tokenizer").exists()
    assert not verify_bundle(tmp_path / "b", source=name, checkpoint=published, device="cpu").problems


def test_weights_on_the_cpu_are_mapped(bundle: Path) -> None:
    """No copy: writing into a tensor changes neither the file nor another load."""
    first, second = (Bundle.open(bundle).mapped("vae") for _ in range(2))
    key = next(iter(first))
    before = second[key].clone()
    first[key].zero_()
    assert equal(second[key], before) and equal(Bundle.open(bundle).mapped("vae")[key], before)
    storages = {tensor.untyped_storage().data_ptr() for tensor in second.values()}
    assert len(storages) == 1


@pytest.mark.parametrize("precision, told", [("float32", "holds fp8 weights"), ("bfloat16", "holds fp8 weights")])
def test_another_precision_is_refused(precision: str, told: str, bundle: Path) -> None:
    with pytest.raises(InputError, match=told):
        load(bundle, precision=precision, device="cpu")


@pytest.mark.parametrize("piece", [1000, 40_000, 1 << 25])
def test_pieces_of_a_file_make_its_tensors(piece: int, bundle: Path) -> None:
    """What a GPU gets, through a buffer in ordinary memory."""
    opened = Bundle.open(bundle)
    records, wanted = opened.records("dit"), opened.mapped("dit")
    made = {key: torch.empty_like(value).fill_(float("nan")) for key, value in wanted.items()}
    targets = {key: value.reshape(-1).view(torch.uint8) for key, value in made.items()}
    buffer = torch.zeros(piece, dtype=torch.uint8)
    pieces = cut(list(records.items()), piece)
    with open(bundle / "dit.safetensors", "rb") as file:
        for part in pieces:
            assert part.end - part.start <= piece
            fill(file.fileno(), buffer, part, bundle / "dit.safetensors")
            scatter(buffer, part, targets)
    assert all(equal(made[key], value) for key, value in wanted.items())
    with open(bundle / "vae.safetensors", "rb") as short, pytest.raises(BundleError, match="ends at byte"):
        fill(short.fileno(), torch.zeros(1 << 25, dtype=torch.uint8), cut(list(records.items()), 1 << 25)[-1], bundle)


# The files


def test_weight_files_are_safetensors_on_pages(bundle: Path, model: Path) -> None:
    dit = source(model, "fp8").system.dit.state_dict()
    read = load_file(bundle / "dit.safetensors")  # the library's own reader
    assert {key for key in read if not key.startswith(PAD)} == dit.keys()
    assert all(equal(read[key], value) for key, value in dit.items())
    for path in bundle.glob("*.safetensors"):
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0
    index = read_index(bundle)
    scaled = [(i, tensor) for i, tensor in enumerate(index.tensors) if tensor.scale is not None]
    assert len(scaled) == sum(key.endswith("_descale") for key in dit)
    assert all(tensor.scale == i + 1 for i, tensor in scaled)  # directly behind


def test_tensors_lie_in_execution_order() -> None:
    """Blocks, injectors and head in the order in which a denoising step calls them."""
    config = LiveAvatarConfig(
        dim=32, ffn_dim=48, num_heads=2, num_layers=4, freq_dim=16, text_dim=16, text_len=4, audio_dim=8,
        audio_layers=3, num_audio_token=2, audio_inject_layers=(2, 0), rope_dtype=torch.float32,
    )  # fmt: skip
    dit = LiveAvatar(config).eval()
    called: list[str] = []
    watched = ["patch_embedding", "head", *(f"blocks.{i}" for i in range(4))]
    watched += [f"audio_injector.injector.{i}" for i in range(2)]
    for name in watched:
        dit.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        text, audio = dit.embed_text(torch.randn(2, 16)), dit.encode_audio(torch.randn(1, 3, 8, 12))
        condition = dit.prefill(torch.randn(1, 16, 1, 4, 4), torch.randn(1, 16, 19, 4, 4), text)
        called.clear()
        from kinora.graphs.models.liveavatar import RollingCache

        cache = RollingCache.allocate(config, 4, dtype=torch.float32, device=torch.device("cpu"))
        time = dit.embed_time(torch.full((1, 1), 500.0))
        dit.forward_block(torch.randn(1, 16, 3, 4, 4), time, text, audio, condition, cache, 0, 0)
    order = execution_order(dit.state_dict(), config.audio_inject_layers)
    assert sorted(order) == sorted(dit.state_dict())

    def owner(key: str) -> str | None:
        return next((name for name in watched if key.startswith(f"{name}.")), None)

    assert list(dict.fromkeys(filter(None, map(owner, order)))) == called


def test_tables_are_the_modulations_of_the_steps(model: Path) -> None:
    system = load(model, device="cpu").system
    tables, mode = schedule_tables(system.dit, system.mode), system.mode
    for index in range(mode.steps):
        step = DenoisingStep(system.dit, mode, index, (8, 8))
        assert float(tables["sigmas"][index]) == float(step.sigma)
        for layer, block in enumerate(system.dit.layers):
            wanted = torch.stack([row[0, 0] for row in block.modulate(step.time.e0)])
            assert torch.equal(tables[f"step.{index}.blocks"][layer], wanted)
        shift = system.dit.head.modulation[:, None] + step.time.e[:, :, None]
        assert torch.equal(tables[f"step.{index}.head"], shift[0, 0])
    assert len(tables["timesteps"]) == mode.steps == len(tables["sigmas"]) - 1


# Whole or not at all


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_breaks_leaves_nothing(
    error: BaseException, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(writing, "pack", fail)  # when all weights are written
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        export_bundle(model, tmp_path / "b", device="cpu")
    assert left(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A process that may write files of 1 MB at most: the operating system's own refusal."""
    command = "import sys; from kinora.runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", command, "bundle", "export", "tiny", "-o", str(tmp_path / "b"), "--device", "cpu"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "could not be written (File too large)" in ran.stderr
    assert left(tmp_path) == []


def test_too_little_space_is_told_before_writing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="GB free"):
        export_bundle(model, tmp_path / "b", device="cpu")
    assert left(tmp_path) == []


def test_what_exists_is_replaced_only_when_asked(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    export_bundle(model, target, precision="float32", device="cpu")
    with pytest.raises(OutputError, match="exists"):
        export_bundle(model, target, device="cpu")
    assert load(target, device="cpu").system.dit.dtype == torch.float32
    export_bundle(model, target, device="cpu", overwrite=True)
    assert load(target, device="cpu").system.dit.dtype == torch.bfloat16
    assert left(tmp_path) == ["b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputError, match="no bundle"):
        export_bundle(model, tmp_path / "mine", device="cpu", overwrite=True)
    assert left(tmp_path / "mine") == ["diary.txt"]


@pytest.mark.parametrize(
    "tensors, told",
    [
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros((1,) * 9)}, "9 dimensions"),
        ({"__metadata__": torch.zeros(1)}, "cannot be a name"),
        ({"a b": torch.zeros(1)}, "cannot be a name"),
        ({"a": torch.zeros(2, 3), "a_descale": torch.ones(3)}, "needs 1 or one a row"),
    ],
)
def test_what_no_bundle_can_hold_is_refused(tensors: dict[str, Tensor], told: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=told):
        write_bundle(tmp_path / "b", {"dit": tensors}, {})
    assert left(tmp_path) == []


# Verifying


def test_a_sound_bundle_is_sound(bundle: Path, model: Path) -> None:
    found = verify_bundle(bundle, source=model, device="cpu")
    assert not found.problems and found.tensors == len(read_index(bundle).tensors)
    assert found.sqnr and all(25 < noise < 45 for noise in found.sqnr.values())


def test_sqnr_is_the_ratio_of_the_powers() -> None:
    weight, scale = torch.randn(6, 50), torch.rand(6, 1) + 0.5
    quantised = (weight / scale).to(torch.float8_e4m3fn)
    noise = quantised.double() * scale - weight.double()
    wanted = 10 * torch.log10(weight.double().square().mean() / noise.square().mean())
    assert sqnr(quantised, scale, weight) == pytest.approx(float(wanted), abs=1e-3)
    assert sqnr(weight, torch.ones(1), weight) == float("inf")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_damage_is_found_and_named(copy: Path) -> None:
    record = read_index(copy).find("dit.head.head.weight")
    flip(copy / "dit.safetensors", record.offset + 5)
    problems = verify_bundle(copy).problems
    assert "dit.head.head.weight was damaged" in problems
    assert any("dit.safetensors has another SHA-256" in problem for problem in problems)
    assert not any("vae" in problem for problem in problems)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda folder: (folder / "kinora_bundle.h").unlink(), "kinora_bundle.h is missing"),
        (lambda folder: edit(folder, lambda m: m["files"].pop("vae.safetensors")), "does not list vae.safetensors"),
        (lambda folder: edit(folder, lambda m: m["files"].update({"../x": {}})), "outside of the bundle"),
        (lambda folder: edit(folder, lambda m: m.pop("files")), "lists no files"),
        (lambda folder: flip(folder / "speech.safetensors", 20), "header was damaged"),
    ],
)
def test_other_damage_is_found(damage: Callable[[Path], None], told: str, copy: Path) -> None:
    damage(copy)
    assert any(told in problem for problem in verify_bundle(copy).problems)


def test_values_that_are_not_finite_are_found(tmp_path: Path) -> None:
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    tensors = {
        "nan": torch.tensor([1.0, float("nan")]).bfloat16(),
        "inf": torch.tensor(float("inf")),
        "w": weight,
        "w_descale": torch.tensor([[1.0], [0.0], [1.0], [1.0]]),
        "fine": torch.ones(3),
    }
    problems = verify_bundle(write_bundle(tmp_path / "b", {"dit": tensors}, {"model": "x"})).problems
    assert problems == [
        "dit.nan holds NaN or infinite values",
        "dit.inf holds NaN or infinite values",
        "dit.w_descale has scales that are not positive",
    ]


def test_a_bundle_of_another_model_is_found(bundle: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    state = load_file(other / "tiny.safetensors")
    state["dit.head.head.bias"] += 1
    state["dit.blocks.0.ffn.0.weight"] = torch.randn_like(state["dit.blocks.0.ffn.0.weight"])
    from safetensors.torch import save_file

    save_file(state, other / "tiny.safetensors")
    problems = verify_bundle(bundle, source=other, device="cpu").problems
    assert len(problems) == 2 and "dit.head.head.bias is not the source's" in problems
    assert any("dit.blocks.0.ffn.0.weight is" in problem and "dB from the source" in problem for problem in problems)


# Damaged bundles are refused


@pytest.mark.parametrize(
    "change",
    [
        *(lambda m, key=key: m.pop(key) for key in ("precision", "architecture", "parts", "mode", "size", "max_area")),
        lambda m: m.update(parts=[1]),
        lambda m: m["parts"].pop("vae"),
        lambda m: m["parts"]["dit"].update(dtype="sin"),
        lambda m: m["parts"]["dit"]["config"].update(dim="many"),
        lambda m: m["parts"]["dit"]["config"].update(num_heads=7),
        lambda m: m["parts"]["dit"]["config"].update(num_heads=0),
        lambda m: m["parts"]["dit"]["config"].update(num_layers=2**40),
        lambda m: m["parts"]["vae"]["config"].update(temporal_downsample=[False, True, 2**70]),
        lambda m: m["parts"]["dit"]["fp8"]["layers"].append("no.such.layer"),
        lambda m: m["parts"]["dit"].update(fp8=None),
        lambda m: m["parts"]["vae"].update(precision="int3"),
        lambda m: m["parts"]["speech"].update(kind="parrot"),
        lambda m: m["parts"]["text"].update(kind="poem"),
        lambda m: m["mode"].update(steps=-1),
        lambda m: m["mode"].update(resink="sometimes"),
        lambda m: m.update(size="large"),
        lambda m: m.update(architecture="bicycle"),
        lambda m: m.update(version=2),
        lambda m: m.update(format="gguf"),
    ],
)
def test_a_manifest_that_describes_no_model_is_refused(change: Callable[[dict], object], copy: Path) -> None:
    edit(copy, change)
    with pytest.raises(CheckpointError) as caught:
        load(copy, device="cpu")
    assert str(copy) in str(caught.value)


def places(value: object, here: tuple = ()) -> list[tuple]:
    """Where the values of a manifest stand."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here] * bool(here) + [place for key, item in inside for place in places(item, (*here, key))]


def test_hostile_manifests_never_crash(bundle: Path, copy: Path) -> None:
    """Values of any kind anywhere: the model loads, or an error says why not; verifying answers in either case."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    rng, refused = random.Random(0), 0
    everywhere = [place for place in places(manifest) if place[0] != "sources"]
    hostile = [None, True, -1, 0, 3, 2.5, 2**70, "", "x", "../../x", "\0", "\ud800", [], [1], {}, {"a": 1}, "0" * 5000]
    for _ in range(60):
        damaged = json.loads(json.dumps(manifest))
        *above, last = rng.choice(everywhere)
        inside = damaged
        for key in above:
            inside = inside[key]
        inside[last] = rng.choice(hostile)
        (copy / "manifest.json").write_text(json.dumps(damaged))
        try:
            load(copy, device="cpu")
        except (CheckpointError, InputError) as error:
            refused += bool(str(error))
        try:
            verify_bundle(copy)
        except CheckpointError as error:
            assert str(copy) in str(error)
    assert refused > 15


def test_missing_and_other_weights_are_listed(model: Path, tmp_path: Path) -> None:
    bundle = export_bundle(model, tmp_path / "b", device="cpu")
    manifest = json.loads((bundle / "manifest.json").read_text())
    parts = {part: dict(Bundle.open(bundle).mapped(part)) for part in ("dit", "vae", "speech", "text")}
    gone = parts["dit"].pop("head.modulation")
    parts["dit"]["surprise"] = gone
    parts["dit"]["head.head.bias"] = parts["dit"]["head.head.bias"].float()
    write_bundle(tmp_path / "c", parts, {key: manifest[key] for key in manifest if key not in ("format", "version")})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "c", device="cpu")
    told = str(caught.value)
    assert "1 missing: head.modulation" in told and "1 unexpected: surprise" in told and "head.head.bias F32" in told


@pytest.mark.parametrize("name", ["bundle.idx", "dit.safetensors", "vae.safetensors"])
def test_a_cut_file_is_named(name: str, copy: Path) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) - 7])
    with pytest.raises(CheckpointError, match=name):
        load(copy, device="cpu")


# The program


def test_the_commands(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "b")
    options = ["--precision", "fp8", "--tables", "--device", "cpu"]
    assert main(["bundle", "export", str(model), "-o", target, *options]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {target}: 0.0")
    assert main(["bundle", "verify", target, "--source", str(model), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "is sound" in told and "equal to the source's" in told and "SQNR" in told
    assert main(["bundle", "inspect", target, "--tensors"]) == 0
    told = capsys.readouterr().out
    assert "small (liveavatar), fp8" in told and "dit.head.head.weight  BF16" in told and "scaled" in told
    flip(Path(target, "vae.safetensors"), 5000)
    assert main(["bundle", "verify", target]) == 2
    assert "vae.safetensors has another SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["export", "tiny", "--precision", "int4", "-o", "x"], "int4"),
        (["export", "nobody", "-o", "x"], "there is no model"),
        (["export", "liveavatar-14b", "-o", "x"], "pass checkpoint="),
        (["export", "tiny", "--prompt", "a person", "-o", "x"], "takes no words"),
        (["verify", "nowhere"], "cannot be read"),
        (["inspect", "."], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bundle", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert left(tmp_path) == []


def test_a_bundle_is_not_exported_again(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a bundle already"):
        export_bundle(bundle, tmp_path / "b")


def test_the_benchmark_loads_what_it_wrote(tmp_path: Path) -> None:
    """On the CPU, with the embedded model, in the process of its own that the GPU gets too."""
    from kinora.bench.bundles import main as bench

    out = tmp_path / "bundles.json"
    assert bench(["--model", "tiny", "--device", "cpu", "--folder", str(tmp_path / "b"), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    loaded = report["load"]
    assert loaded["equal_to_the_files"] and loaded["finite"] and len(loaded["seconds"]) == 3
    assert loaded["parts_seconds"].keys() == {"dit", "vae", "speech", "text"}
    assert loaded["bytes"] < report["write"]["bytes"] and left(tmp_path) == ["bundles.json"]
