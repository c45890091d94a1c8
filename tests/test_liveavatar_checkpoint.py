"""The published folder layout of LiveAvatar, with small networks in every file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kinora.checkpoints_tools.liveavatar import LORA_ALPHA
from kinora.checkpoints_tools.load import Fp8
from kinora.graphs.quantize import Fp8Linear, quantize_linears
from kinora.runtime import load
from kinora.runtime.errors import CheckpointError
from kinora.runtime.systems import liveavatar_checkpoint as published
from kinora.runtime.systems.liveavatar_mode import STREAM
from published_folder import DIT, RANK, make_text_small, write_published
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    make_text_small(monkeypatch)


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_published_folder_talks(folder: Path, precision: str) -> None:
    avatar = load("liveavatar-14b", checkpoint=folder, precision=precision, device="cpu")
    assert avatar.size is None and avatar.mode == STREAM
    assert avatar.system.dit.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
    picture = np.random.default_rng(0).integers(0, 256, (200, 150, 3), np.uint8)
    voice = (0.1 * np.random.default_rng(1).standard_normal(8000)).astype(np.float32)
    changed = {"steps": 1, "size": (64, 64)}
    frames = avatar.configured(motion_frames=9).generate(picture, voice, prompt="a person", **changed).frames
    other = avatar.configured(motion_frames=9).generate(picture, voice, prompt="a", **changed).frames
    assert frames.shape == (13, 64, 64, 3)
    assert not np.array_equal(frames, other)  # the prompt reaches the model


def test_lora_is_merged_before_the_cast(folder: Path) -> None:
    dit = load("liveavatar-14b", checkpoint=folder / published.BASE, precision="float32", device="cpu").system.dit
    base = folder / published.BASE
    shards = [load_file(path) for path in sorted(base.glob("*.safetensors"))]
    weights = {key: value for shard in shards for key, value in shard.items()}
    lora = load_file(folder / "Live-Avatar" / published.LORA)
    name = "blocks.1.ffn.2"
    a, b = (lora[f"{name}.lora_{side}.default.weight"].float() for side in "AB")
    merged = (weights[f"{name}.weight"].float() + LORA_ALPHA / RANK * (b @ a)).bfloat16()
    assert torch.equal(dit.get_submodule(name).weight, merged.float())
    assert torch.equal(dit.head.head.weight, weights["head.head.weight"].float())


def test_a_lora_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / published.BASE
    base.mkdir()
    for file in (folder / published.BASE).iterdir():
        (base / file.name).symlink_to(file)
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 32)}, base / published.LORA)
    with pytest.raises(CheckpointError, match="target layers have no LoRA"):
        load("liveavatar-14b", checkpoint=tmp_path, device="cpu")


@pytest.mark.parametrize("change, told", [({"num_layers": 3}, r"blocks\.2\."), ({"enable_tsm": True}, "enable_tsm")])
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, change: dict, told: str) -> None:
    base = tmp_path / published.BASE
    base.mkdir()
    for file in [*(folder / published.BASE).iterdir(), folder / "Live-Avatar" / published.LORA]:
        if file.name != "config.json":
            (base / file.name).symlink_to(file)
    (base / "config.json").write_text(json.dumps(DIT | change))
    with pytest.raises(CheckpointError, match=told):
        load("liveavatar-14b", checkpoint=base, device="cpu")


def in_cache(cache: Path, repository: str, files: list[Path]) -> Path:
    """A repository in a Hub's cache, as huggingface_hub lays it out; returns the snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    for file in files:
        (snapshot / file.name).symlink_to(file)
    return snapshot


@pytest.mark.parametrize("place", ["liveavatar.safetensors", "LiveAvatar/liveavatar.safetensors"])
def test_the_folder_of_the_original_repository(folder: Path, tmp_path: Path, place: str) -> None:
    """`ckpt/Wan2.2-S2V-14B` beside `ckpt/LiveAvatar`, or the LoRA in `ckpt` itself."""
    (tmp_path / published.BASE).symlink_to(folder / published.BASE)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).symlink_to(folder / "Live-Avatar" / published.LORA)
    files = published.locate_files(tmp_path)
    assert not files.missing and files.lora is not None and files.lora.samefile(tmp_path / place)


def test_repositories_in_the_hubs_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = in_cache(tmp_path, published.BASE_REPOSITORY, list((folder / published.BASE).iterdir()))
    with pytest.raises(CheckpointError, match=r"LoRA of LiveAvatar cannot be had.*HF_HUB_OFFLINE is set"):
        load("liveavatar-14b", checkpoint=published.BASE_REPOSITORY, device="cpu")
    with pytest.raises(CheckpointError, match=r"lacks liveavatar\.safetensors"):
        load("liveavatar-14b", checkpoint=base, device="cpu")
    in_cache(tmp_path, published.LORA_REPOSITORY, [folder / "Live-Avatar" / published.LORA])
    for checkpoint in (published.BASE_REPOSITORY, f"{published.BASE_REPOSITORY}@main", base, base.parents[1]):
        avatar = load("liveavatar-14b", checkpoint=checkpoint, device="cpu", precision="bfloat16")
        assert avatar.system.dit.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"has no Wan-AI/Wan2\.2-S2V-14B@other"):
        load("liveavatar-14b", checkpoint=f"{published.BASE_REPOSITORY}@other", device="cpu")


def test_layers_are_quantised_while_they_are_read(folder: Path) -> None:
    """The same bits as quantising the whole model afterwards, in the recipe of a row and an output channel."""
    system = published.load_published(folder, torch.bfloat16, torch.device("cpu"), Fp8())
    whole = published.load_published(folder, torch.bfloat16, torch.device("cpu")).dit
    replaced = quantize_linears(whole, granularity="row")
    assert "blocks.0.self_attn.q" in replaced and isinstance(system.dit.blocks[0].self_attn.q, Fp8Linear)
    state = whole.state_dict()
    assert state.keys() == system.dit.state_dict().keys()
    assert all(torch.equal(v.view(torch.uint8), state[k].view(torch.uint8)) for k, v in system.dit.state_dict().items())


def test_a_file_that_is_no_vae_is_named(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / published.BASE
    base.mkdir()
    for file in [*(folder / published.BASE).iterdir(), folder / "Live-Avatar" / published.LORA]:
        (base / file.name).symlink_to(file)
    state = torch.load(base / published.VAE_WEIGHTS, weights_only=True)
    lost = state.pop("decoder.head.2.bias")
    state["decoder.head.2.wires"] = lost
    (base / published.VAE_WEIGHTS).unlink()
    torch.save(state, base / published.VAE_WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"Wan2\.1_VAE\.pth: .*missing: decoder\.head\.2\.bias.*unexpected.*wires"
    ):
        load("liveavatar-14b", checkpoint=base, device="cpu")
    torch.save({"x": lost}, base / published.VAE_WEIGHTS)
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth holds no Wan 2\.1 VAE"):
        load("liveavatar-14b", checkpoint=base, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vae_has_the_bits_of_its_file(folder: Path, dtype: torch.dtype) -> None:
    system = published.load_published(folder, dtype, torch.device("cpu"))
    state = torch.load(folder / published.BASE / published.VAE_WEIGHTS, weights_only=True)
    held = system.vae.state_dict()
    assert held.keys() == state.keys() and all(torch.equal(held[key], v.to(dtype)) for key, v in state.items())
    assert not system.vae.training and not any(p.requires_grad for p in system.vae.parameters())
