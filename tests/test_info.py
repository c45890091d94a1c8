"""`kinora info`: what this machine has, which models it would run, and whether their files are there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_doubles import run
from kinora.runtime.errors import CheckpointError
from safetensors.numpy import save_file

pytest.importorskip("av")  # whose version it tells
from kinora.runtime import info as info_module


def test_info_names_machine_models_and_ops(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(["info"], capsys)
    assert code == 0
    for word in ("machine", "torch", "FFmpeg", "GPU", "tiny", "liveavatar-14b", "rope_attention", "PyTorch"):
        assert word in out


def test_info_asks_the_dispatch_what_computes_an_op(monkeypatch):
    cpu = torch.device("cpu")
    for interpreter, attention in [("0", "PyTorch, cpu"), ("1", "Triton, cpu")]:
        monkeypatch.setenv("TRITON_INTERPRET", interpreter)
        computed = {op.name: op.backend for op in info_module.list_ops(cpu)}
        assert computed["rope_attention"] == computed["adaln"] == attention
        assert computed["fp8_matmul"] == "PyTorch, cpu"  # which has no kernel of its own


def test_info_tells_whether_a_checkpoint_is_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert info_module.collect().models[1].folder is None
    snapshot = tmp_path / "cache" / "models--Wan-AI--Wan2.2-S2V-14B" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    cached = info_module.collect().models[1]
    assert cached.folder == snapshot and "lacks config.json" in cached.would_run
    newer = snapshot.with_name("4567")
    newer.mkdir()
    assert info_module.collect().models[1].folder is None, "which of the two is not known, and `load` takes neither"
    (tmp_path / "cache" / "models--Wan-AI--Wan2.2-S2V-14B" / "refs").mkdir()
    (tmp_path / "cache" / "models--Wan-AI--Wan2.2-S2V-14B" / "refs" / "main").write_text("4567")
    assert info_module.collect().models[1].folder == newer
    assert info_module.collect(Path("Wan-AI/Wan2.2-S2V-14B")).models[1].folder == newer
    assert info_module.collect(Path("other/model")).models[1].folder is None
    folder = tmp_path / "Wan2.2-S2V-14B"
    for name in ("google/umt5-xxl", "wav2vec2-large-xlsr-53-english"):
        (folder / name).mkdir(parents=True)
    for name in (
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
    ):
        (folder / name).touch()
    assert "lacks liveavatar.safetensors" in info_module.collect().models[1].would_run
    (folder / "liveavatar.safetensors").touch()
    small, large = (info_module.Gpu("card", memory, True, None) for memory in (24.0, 140.0))
    for gpus, told in [((), "this machine has none"), ((small,), "has 26 GB"), ((small, large), "yes, on one GPU")]:
        monkeypatch.setattr(info_module, "list_gpus", lambda gpus=gpus: gpus)
        assert told in info_module.collect(folder).models[1].would_run


@pytest.mark.parametrize(
    "card, memory_gib, fp8, told",
    [
        ("H100 80GB", 79.2, True, "yes, on one GPU in FP8 (precision fp8)"),
        ("A100 80GB", 79.2, False, "no: "),
        ("H100 NVL", 93.1, True, "yes, on one GPU in FP8 (precision fp8)"),
        ("H200", 139.8, True, "yes, on one GPU in bfloat16 or FP8"),
        ("L40S", 44.4, True, "62 GB for FP8 (H100, H200 or later) or 103 GB for bfloat16; the largest here has 48 GB"),
    ],
)
def test_info_tells_the_precision_that_fits(card, memory_gib, fp8, told):
    assert told in info_module._liveavatar_on((info_module.Gpu(card, memory_gib, fp8, None),))


def test_info_counts_the_parameters_of_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(info_module, "TINY_FOLDER", tmp_path)
    assert "no: " in info_module.collect().models[0].would_run
    save_file({"a": np.zeros((1000, 1500), np.float16), "b": np.zeros(7, np.float32)}, tmp_path / "tiny.safetensors")
    tiny = info_module.collect().models[0]
    assert tiny.size == "1.5 M parameters, 3.0 MB" and tiny.would_run.startswith("yes")
    (tmp_path / "tiny.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot be read"):
        info_module.collect()
