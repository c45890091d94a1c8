"""A training run that travels: averaged weights and second moments survive, the run goes on from its step."""

from pathlib import Path

import pytest
import torch
from kinora.train.loop import Ema, load_checkpoint, save_checkpoint
from kinora.train.muon import MuonAdamW
from kinora.train.tiny import portable
from torch import nn


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    module = nn.Linear(300, 200)
    optimizer = MuonAdamW([module.weight], [module.bias], betas=(0.9, 0.99), weight_decay=0.0)
    optimizer.set_learning_rate(1e-3)
    ema = Ema(module, 0.5)
    for step in range(3):
        module(torch.randn(8, 300)).square().mean().backward()
        optimizer.step()
        ema.update(module, step)
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.values, "step": 3}
    save_checkpoint(tmp_path / "run" / "vae.pt", state)
    (tmp_path / "run" / "vae.jsonl").write_text('{"step": 3}\n')
    return tmp_path / "run"


def test_round_trip(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "PART_BYTES", 10_000)
    parts = portable.pack(run, tmp_path / "parts")
    assert len(parts) > 5
    assert all(part.stat().st_size <= 10_000 for part in parts)
    assert portable.main(["unpack", str(tmp_path / "parts"), str(tmp_path / "again")]) == 0
    before = load_checkpoint(run / "vae.pt", torch.device("cpu"))
    after = load_checkpoint(tmp_path / "again" / "vae.pt", torch.device("cpu"))
    assert before is not None and after is not None
    assert after["step"] == 3
    for name, value in before["ema"].items():
        torch.testing.assert_close(after["model"][name], value, rtol=1e-3, atol=1e-6)
    for index, state in before["optimizer"]["adamw"]["state"].items():
        moments = after["optimizer"]["adamw"]["state"][index]["exp_avg_sq"]
        torch.testing.assert_close(moments.sqrt(), state["exp_avg_sq"].sqrt(), rtol=1e-3, atol=1e-6)
    module = nn.Linear(300, 200)
    optimizer = MuonAdamW([module.weight], [module.bias], betas=(0.9, 0.99), weight_decay=0.0)
    optimizer.load_state_dict(after["optimizer"])
    assert optimizer.muon.param_groups[0]["lr"] is optimizer.lr  # still the one that set_learning_rate sets
    assert (tmp_path / "again" / "vae.jsonl").read_text() == '{"step": 3}\n'


def test_nothing_to_carry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert portable.main(["pack", str(tmp_path), str(tmp_path / "parts")]) == 2
    assert portable.main(["unpack", str(tmp_path), str(tmp_path / "run")]) == 2
    assert "no parts" in capsys.readouterr().err
