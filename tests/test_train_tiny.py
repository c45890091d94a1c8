"""Training of the embedded model by the documented command: a whole run, cut off and resumed, and its export."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kinora.runtime import load
from kinora.train import loop
from kinora.train.tiny import __main__ as command
from kinora.train.tiny import dit_stage, vae_stage
from kinora.train.tiny.clips import LEAD_IN
from kinora.train.tiny.recipe import FULL, PRESETS, SMOKE, Recipe, Stage
from tiny_training import bank

QUICK = replace(
    SMOKE,
    size=32,
    vae_crop=16,
    blocks=1,
    pool=4,
    vae=Stage(steps=4, batch=1, rate=1e-3, warmup=1, report_every=1, save_every=2),
    flow=Stage(steps=4, batch=2, rate=1e-3, warmup=1, report_every=1, save_every=2),
    rollout=Stage(steps=2, batch=2, rate=5e-4, warmup=1, report_every=1, save_every=1),
)


def prepared(folder: Path, recipe: Recipe) -> list[str]:
    """A run folder that has its speech already, so that no espeak-ng is needed; the command's arguments for it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(bank(recipe.utterances, recipe.utterance_seconds, 1), folder / "speech-train.pt")
    torch.save(bank(recipe.utterances, recipe.utterance_seconds, 2), folder / "speech-test.pt")
    return ["--out", str(folder), "--preset", "smoke", "--device", "cpu"]


def curve(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_exported(folder: Path, side: int) -> None:
    """The folder is a model that the runtime loads and that makes frames."""
    avatar = load(folder, device="cpu")
    assert avatar.size == side
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    frames = avatar.generate(picture, bank(1, 0.3)[0].float().numpy() / 32768).frames
    assert frames.shape == (8, side, side, 3) and frames.std() > 0


@pytest.mark.parametrize("preset", list(PRESETS))
def test_recipes_fit_together(preset: str) -> None:
    recipe = PRESETS[preset]
    assert recipe.size % 16 == 0 and recipe.vae_crop <= recipe.size and recipe.dim % recipe.heads == 0
    assert recipe.utterance_seconds * 25 >= LEAD_IN + max(recipe.preroll + recipe.clip_frames, recipe.vae_frames) + 2
    assert max(recipe.flow.batch, recipe.rollout.batch) <= recipe.pool and recipe.pool % recipe.refill == 0
    assert FULL.size in range(192, 257)


def test_the_smoke_run_trains_and_exports(tmp_path: Path) -> None:
    """`python -m kinora.train.tiny --out DIR --preset smoke --device cpu`, from nothing to a model that generates."""
    assert command.main(prepared(tmp_path / "run", SMOKE)) == 0
    vae, dit = curve(tmp_path / "run" / "vae.jsonl"), curve(tmp_path / "run" / "dit.jsonl")
    assert [row["step"] for row in vae] == [2, 4, 6]
    assert [row["step"] for row in dit if "flow" in row] == [2, 4, 6]
    assert [row["step"] for row in dit if "rollout" in row] == [8, 10]
    assert [row["step"] for row in dit if "mouth_correlation" in row] == [3, 6, 8, 10]
    assert all(math.isfinite(value) for row in vae + dit for value in row.values())
    assert (tmp_path / "run" / "validation.png").is_file()
    check_exported(tmp_path / "run" / "tiny", SMOKE.size)


class CutOff(Exception):
    """Stands for the machine that goes away."""


@pytest.mark.parametrize(
    ("stage", "saves"), [("vae_stage", 1), ("dit_stage", 1), ("dit_stage", 3)], ids=["vae", "flow", "rollout"]
)
def test_a_cut_off_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, saves: int) -> None:
    """Cut off right after a checkpoint, a rerun goes on from it, repeats nothing that was saved and finishes."""
    monkeypatch.setitem(command.PRESETS, "smoke", QUICK)
    arguments = prepared(tmp_path, QUICK)
    module = {"vae_stage": vae_stage, "dit_stage": dit_stage}[stage]
    left = [saves]

    def save_then_stop(path: Path, state: dict) -> None:
        loop.save_checkpoint(path, state)
        left[0] -= 1
        if not left[0]:
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", save_then_stop)
        with pytest.raises(CutOff):
            command.main(arguments)
    assert not (tmp_path / "tiny").exists()
    assert command.main(arguments) == 0
    vae, dit = curve(tmp_path / "vae.jsonl"), curve(tmp_path / "dit.jsonl")
    assert [row["step"] for row in vae] == [1, 2, 3, 4]
    trained = [(row["step"], name) for row in dit for name in ("flow", "rollout") if name in row]
    assert trained == [(1, "flow"), (2, "flow"), (3, "flow"), (4, "flow"), (5, "rollout"), (6, "rollout")]
    check_exported(tmp_path / "tiny", QUICK.size)


def test_a_finished_run_only_exports_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained anew, and the same weights come out."""
    monkeypatch.setitem(command.PRESETS, "smoke", QUICK)
    arguments = prepared(tmp_path, QUICK)
    assert command.main(arguments) == 0
    curves = {name: (tmp_path / name).read_text() for name in ("vae.jsonl", "dit.jsonl")}
    weights = (tmp_path / "tiny" / "tiny.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "tiny")
    assert command.main(arguments) == 0
    assert {name: (tmp_path / name).read_text() for name in curves} == curves
    assert (tmp_path / "tiny" / "tiny.safetensors").read_bytes() == weights


def test_speech_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []

    def speak(count: int, seconds: float, *, seed: int, split: str) -> torch.Tensor:
        made.append((count, seconds, seed, split))
        return bank(count, seconds, seed)

    monkeypatch.setattr(command, "synthesise", speak)
    first = command.speech_bank(SMOKE, tmp_path / "run", 5, "train", 3)
    assert torch.equal(command.speech_bank(SMOKE, tmp_path / "run", 5, "train", 3), first)
    assert made == [(3, SMOKE.utterance_seconds, 5, "train")]


def test_speech_that_was_cut_off_while_it_was_saved_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "synthesise", lambda count, seconds, *, seed, split: bank(count, seconds, seed))

    def stop(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise CutOff

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(torch, "save", stop)
        command.speech_bank(SMOKE, tmp_path, 5, "train", 3)
    assert command.speech_bank(SMOKE, tmp_path, 5, "train", 3).shape[0] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["speech-train.pt"]


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--preset", "huge", "--out", "run"])
    assert "full" in capsys.readouterr().err
