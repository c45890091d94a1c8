"""What every training stage is made of: learning rate, averaged weights, curves, checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from kinora.train import loop
from tiny_training import CPU


def test_learning_rate_warms_up_and_falls_to_the_floor() -> None:
    rates = [loop.warmup_cosine(step, 100, 2.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.04) and loop.warmup_cosine(500, 100, 2.0, 10) == pytest.approx(0.04)
    assert rates[55] == pytest.approx(2.0 * (0.02 + 0.98 / 2))


def test_ema_averages_and_comes_back() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = loop.Ema(module, 0.999)
    torch.nn.init.ones_(module.weight)
    ema.update(module, 0)  # the decay warms up from 1/10
    assert torch.allclose(ema.values["weight"], torch.full((1, 2), 0.9))
    ema.update(module, 10**9)
    assert torch.allclose(ema.values["weight"], torch.full((1, 2), 0.9001))
    assert torch.equal(module.weight.detach(), torch.ones(1, 2))  # watching changes nothing
    ema.copy_to(module)
    assert torch.allclose(module.weight.detach(), torch.full((1, 2), 0.9001))


def test_curves_are_appended_to(tmp_path: Path) -> None:
    loop.Curve(tmp_path / "a" / "loss.jsonl").add(1, loss=0.5)
    loop.Curve(tmp_path / "a" / "loss.jsonl").add(2, loss=torch.tensor(0.25))
    rows = [json.loads(line) for line in (tmp_path / "a" / "loss.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.25)]


def test_a_cut_off_save_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "state.pt"
    assert loop.load_checkpoint(path, CPU) is None
    loop.save_checkpoint(path, {"step": 1})

    def cut_off(state: object, target: Path) -> None:
        Path(target).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.torch, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            loop.save_checkpoint(path, {"step": 2})
    assert loop.load_checkpoint(path, CPU) == {"step": 1}
    loop.save_checkpoint(path, {"step": 3})  # what the cut-off save left is no obstacle
    assert loop.load_checkpoint(path, CPU) == {"step": 3}
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]
