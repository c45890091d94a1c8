"""`verify` with the source: weights, a prompt's rows and the folded tables, each compared, and what was not is told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kinora.checkpoints_tools.bundle.read import Bundle
from kinora.checkpoints_tools.bundle.verify import verify
from kinora.checkpoints_tools.bundle.write import write_bundle
from kinora.runtime.bundles import export_bundle, verify_bundle
from kinora.runtime.cli import main
from published_folder import make_text_small, write_published
from small_model import write_model
from torch import Tensor

NAME = "liveavatar-14b"
Parts = dict[str, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    make_text_small(monkeypatch)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def bundle(published: Path, tmp_path: Path) -> Path:
    options = {"prompt": "a person", "tables": True, "precision": "fp8", "device": "cpu"}
    return export_bundle(NAME, tmp_path / "b", checkpoint=published, **options)  # type: ignore[arg-type]


def rewritten(folder: Path, change: Callable[[Parts, dict], object]) -> Path:
    """A sound bundle with other content: every checksum fits."""
    opened = Bundle.open(folder)
    parts = {part: {key: value.clone() for key, value in opened.mapped(part).items()} for part in opened.parts}
    manifest = json.loads((folder / "manifest.json").read_text())
    change(parts, manifest)
    kept = {key: value for key, value in manifest.items() if key not in ("format", "version", "files")}
    return write_bundle(folder.with_name("changed"), parts, kept)


def test_results_are_computed_once_more(bundle: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify_bundle(bundle, source=NAME, checkpoint=published, device="cpu")
    assert not found.problems and found.sqnr
    assert found.equal == ["dit", "speech", "vae"] and found.recomputed == {"tables": 0, "text": 0}
    assert not found.uncompared
    without = verify_bundle(bundle)
    assert not (without.problems or without.equal or without.recomputed or without.uncompared)
    command = ["bundle", "verify", str(bundle), "--source", NAME, "--checkpoint", str(published), "--device", "cpu"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "dit, speech, vae: every tensor that is not quantised is equal to the source's" in told
    assert "text: equal to what the source computes here" in told
    assert "tables: equal to what the source computes here" in told


def one_block(parts: Parts, _: dict) -> None:
    parts["tables"]["step.1.blocks"][1, 3] *= 1.1


def another_noise_level(parts: Parts, _: dict) -> None:
    parts["tables"]["sigmas"][1] *= 1.001


def no_table(parts: Parts, _: dict) -> None:
    del parts["tables"]["step.2.head"]


def not_finite(parts: Parts, _: dict) -> None:
    parts["text"]["rows"][0, 0] = float("nan")


def other_words(_: Parts, manifest: dict) -> None:
    manifest["parts"]["text"]["prompt"] = "a"


def other_rows(parts: Parts, _: dict) -> None:
    parts["text"]["rows"] = parts["text"]["rows"].flip(0)


def wider_rows(parts: Parts, _: dict) -> None:
    parts["text"]["rows"] = parts["text"]["rows"].float()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_block, r"tables.step.1.blocks differs by .* from what the source gives (limit 1e-04)"),
        (another_noise_level, "tables.sigmas differs by"),
        (no_table, "tables: the source and the bundle have other tensors (step.2.head)"),
        (not_finite, "text.rows differs by nan"),
        (other_words, "text.rows has shape"),
        (other_rows, "text.rows differs by"),
        (wider_rows, "text.rows has dtype torch.float32, the source torch.bfloat16"),
    ],
)
def test_other_results_are_found(
    change: Callable[[Parts, dict], object], told: str, bundle: Path, published: Path
) -> None:
    problems = verify_bundle(rewritten(bundle, change), source=NAME, checkpoint=published, device="cpu").problems
    start, _, end = told.partition(".*")
    assert any(problem.startswith(start) and end in problem for problem in problems), problems
    part = start.partition(".")[0].partition(":")[0]
    assert all(problem.startswith(part) for problem in problems)


def test_one_row_of_a_result_is_found(tmp_path: Path) -> None:
    """Among so many that the whole is within the limit of half precision."""
    rows = torch.randn(1000, 16).bfloat16()
    wrong = rows.clone()
    wrong[321] = 0
    made = Bundle.open(write_bundle(tmp_path / "b", {"text": {"rows": wrong}}, {"model": "x"}))
    found = verify(made, None, {"text": {"rows": rows}})
    assert found.recomputed["text"] < 5e-2
    assert found.problems == ["text.rows: row 321 differs by 1.0e+00 from what the source gives (limit 1e-01)"]


def test_rounding_of_another_device_is_no_problem(bundle: Path, published: Path) -> None:
    def rounding(parts: Parts, _: dict) -> None:
        parts["tables"]["step.0.blocks"] *= 1 + 1e-6
        parts["text"]["rows"] *= 1 + 2**-7

    found = verify_bundle(rewritten(bundle, rounding), source=NAME, checkpoint=published, device="cpu")
    assert not found.problems
    assert 0 < found.recomputed["tables"] < 1e-5 < found.recomputed["text"] < 1e-2


def test_what_the_source_lacks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "small")
    made = export_bundle(model, tmp_path / "b", device="cpu")

    def more(parts: Parts, _: dict) -> None:
        parts["voice"] = {"w": torch.ones(3)}

    changed = rewritten(made, more)
    assert verify_bundle(changed, source=model, device="cpu").uncompared == ["voice"]
    assert main(["bundle", "verify", str(changed), "--source", str(model), "--device", "cpu"]) == 0
    assert "not compared, because the source has nothing like it: voice" in capsys.readouterr().out
