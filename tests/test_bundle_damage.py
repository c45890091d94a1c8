"""Bundles that are sound, damaged or hostile: what `verify` finds, what `load` refuses, what the program says."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import left
from kinora.checkpoints_tools.bundle.format import BundleError, read_index
from kinora.checkpoints_tools.bundle.read import Bundle
from kinora.checkpoints_tools.bundle.verify import sqnr, verify
from kinora.checkpoints_tools.bundle.write import write_bundle
from kinora.kernels.fp8_linear import Granularity
from kinora.kernels.quantize_rows import quantize_fp8
from kinora.runtime import load
from kinora.runtime.bundles import export_bundle, verify_bundle
from kinora.runtime.cli import main
from kinora.runtime.errors import CheckpointError, InputError
from safetensors.torch import load_file, save_file
from small_model import write_model
from torch import Tensor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "small-fp8", precision="fp8", device="cpu")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


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


def zeroed(weight: Tensor, scale: Tensor) -> None:
    weight.view(torch.uint8)[5] = 0


def doubled(weight: Tensor, scale: Tensor) -> None:
    scale[5] *= 2


@pytest.mark.parametrize(("granularity", "change"), [("row", zeroed), ("row", doubled), ("tensor", zeroed)])
def test_one_wrong_row_is_found(
    granularity: Granularity, change: Callable[[Tensor, Tensor], None], tmp_path: Path
) -> None:
    """Among so many that the whole is within the limit."""
    source = {"a": torch.randn(512, 64), "w": torch.randn(512, 64), "n": torch.randn(9)}
    source["w"][7] *= 2.0**-16  # nothing but rounding to zero is left of it with one scale for all
    weight, scale = quantize_fp8(source["w"], granularity)
    tensors = source | {"w": weight, "w_descale": scale}
    sound = Bundle.open(write_bundle(tmp_path / "sound", {"dit": tensors}, {"model": "x"}))
    assert verify(sound, {"dit": source}).problems == []
    change(weight, scale)
    found = verify(Bundle.open(write_bundle(tmp_path / "b", {"dit": tensors}, {"model": "x"})), {"dit": source})
    assert found.sqnr["dit.w"] > 20
    (problem,) = found.problems
    assert problem.startswith("dit.w: row 5 is ") and problem.endswith(" dB from the source, below 20")
    assert abs(float(problem.split()[4])) < 1


def test_weights_are_compared_bit_by_bit(tmp_path: Path) -> None:
    source = {"w": torch.tensor([1.0, 0.0]), "i": torch.arange(3)}
    tensors = source | {"w": torch.tensor([1.0, -0.0])}
    made = Bundle.open(write_bundle(tmp_path / "b", {"dit": tensors}, {"model": "x"}))
    assert verify(made, {"dit": source}).problems == ["dit.w is not the source's"]


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (torch.tensor([1000, 1]), torch.tensor([1000, 2]), "is not what the source gives"),
        (torch.tensor([1000.0, 1.0]).double(), torch.tensor([1000.0, 1.01]).double(), "is not what the source gives"),
    ],
)
def test_only_what_is_summed_may_differ(ours: Tensor, theirs: Tensor, told: str, tmp_path: Path) -> None:
    made = Bundle.open(write_bundle(tmp_path / "b", {"tables": {"t": ours}}, {"model": "x"}))
    assert verify(made, None, {"tables": {"t": theirs}}).problems == [f"tables.t {told}"]
    assert not verify(made, None, {"tables": {"t": ours}}).problems


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
    save_file(state, other / "tiny.safetensors")
    problems = verify_bundle(bundle, source=other, device="cpu").problems
    (file,) = [problem for problem in problems if problem.startswith("manifest.json and the source differ: ")]
    assert re.search(r"sources\.1\.sha256 is \"[0-9a-f]+ \.\.\., not \"", file)
    assert len(problems) == 3 and "dit.head.head.bias is not the source's" in problems
    assert any("dit.blocks.0.ffn.0.weight is" in problem and "dB from the source" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["mode"].update(steps=5), ["mode.steps is 5, not 4"]),
        (lambda m: m["mode"].update(near_distance=True), ["mode.near_distance is true, not 4"]),
        (lambda m: m["mode"].pop("resink"), ["mode.resink is missing"]),
        (lambda m: m["parts"]["dit"]["config"].update(eps=1e-5), ["parts.dit.config.eps is 1e-05, not 1e-06"]),
        (lambda m: m["parts"]["vae"]["config"]["latent_mean"].pop(), ["vae.config.latent_mean has 3 entries, not 4"]),
        (lambda m: m["parts"]["vae"].update(precision="float32"), ['parts.vae.precision is "float32", not "bfloat16"']),
        (lambda m: m["parts"]["dit"]["fp8"]["layers"].pop(), ["parts.dit.fp8.layers has"]),
        (lambda m: m["parts"]["text"].update(prompt="a person"), ['parts.text.prompt is "a person", not null']),
        (lambda m: m["recipe"]["kept"].clear(), ["recipe.kept has 0 entries, not 5"]),
        (lambda m: m.update(size=[64, 128], max_area=5), ["size.1 is 128, not 64", "max_area is 5, not "]),
        (lambda m: m.update(sources=[]), ["sources has 0 entries, not 2"]),
        (lambda m: m["sources"][0].update(size=1), ["sources.0.size is 1, not "]),
        (lambda m: m.pop("sources"), ["sources is missing"]),
        (lambda m: m["parts"].update({"\ud800": 1}), ["parts.\\ud800 is too much"]),
    ],
)
def test_what_the_manifest_says_is_compared_with_the_source(
    change: Callable[[dict], object], told: list[str], copy: Path, model: Path
) -> None:
    edit(copy, change)
    problems = verify_bundle(copy, source=model, device="cpu").problems
    assert len(problems) == len(told), problems
    for problem, wanted in zip(problems, told, strict=True):
        assert problem.startswith("manifest.json and the source differ: ") and wanted in problem
    assert not verify_bundle(copy).problems  # no hash covers it


def test_every_number_of_the_mode_is_compared(copy: Path, model: Path) -> None:
    mode = json.loads((copy / "manifest.json").read_text())["mode"]
    changed = {key: value + 1 for key, value in mode.items() if type(value) in (int, float)}
    edit(copy, lambda manifest: manifest["mode"].update(changed))
    problems = verify_bundle(copy, source=model, device="cpu").problems
    assert len(changed) > 10 and len(problems) == len(changed)
    assert all(any(f": mode.{name} is " in problem for problem in problems) for name in changed)


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


def test_a_part_that_is_missing_is_found(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(3)}
    made = Bundle.open(write_bundle(tmp_path / "b", {"dit": tensors}, {"model": "x"}))
    assert verify(made, {"dit": tensors, "vae": tensors}).problems == [
        "the bundle lacks the part vae, which its source has"
    ]


def test_a_replacement_that_fails_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"dit": {"w": torch.ones(3)}}
    made = write_bundle(tmp_path / "b", tensors, {"model": "x"})
    before, rename = (made / "dit.safetensors").read_bytes(), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if target == made and "-old-" not in path.name:
            raise OSError(5, "the disk went away")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BundleError, match="what was there before is kept"):
        write_bundle(made, {"dit": {"w": torch.zeros(3)}}, {"model": "x"}, overwrite=True)
    assert (made / "dit.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["b"]
