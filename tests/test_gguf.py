"""GGUF files, read back with the package's own reader: names, shapes, types, values, metadata."""

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from kinora.checkpoints_tools.gguf import Type, storage, write_gguf, write_transformer
from kinora.graphs.models.liveavatar import LiveAvatar
from kinora.graphs.quantize import LIVEAVATAR_IGNORE
from kinora.runtime import load
from kinora.runtime.cli import main
from small_model import write_model
from torch import Tensor

SIZES = {"block_count": 1}


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> LiveAvatar:
    return load(write_model(tmp_path_factory.mktemp("model")), device="cpu").system.dit


def write(state: dict[str, Tensor], path: Path, kind: Type, keep: tuple[str, ...] = ()) -> dict[str, int]:
    return write_gguf(state, path, kind, architecture="wan", name="test", sizes=SIZES, config={}, keep=keep)


def read(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Name -> (storage type, values in float32)."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (
            tensor.tensor_type.name,
            torch.from_numpy(np.array(values)).reshape([int(n) for n in reversed(tensor.shape)]),
        )
    return found


def test_bf16_holds_every_tensor_exactly(dit: LiveAvatar, tmp_path: Path) -> None:
    state = dit.state_dict()
    counts = write_transformer(dit, tmp_path / "model.gguf", "bf16", "small")
    found = read(tmp_path / "model.gguf")
    assert found.keys() == state.keys() and sum(counts.values()) == len(state)
    for name, (kind, values) in found.items():
        wanted = state[name].float() if kind == "F32" else state[name].to(torch.bfloat16).float()
        assert torch.equal(values.reshape(wanted.shape), wanted), name
        assert (kind == "F32") == (wanted.dim() < 2 or not name.endswith(".weight"))
    assert not list(tmp_path.glob("*.part"))


def test_q8_0_is_within_half_a_step_of_its_block(dit: LiveAvatar, tmp_path: Path) -> None:
    """A step is max |x| / 127 of 32 values, rounded to float16, which costs a little more at the largest value."""
    state = dit.state_dict()
    counts = write_transformer(dit, tmp_path / "model.gguf", "q8_0", "small")
    found = read(tmp_path / "model.gguf")
    assert counts["Q8_0"] == sum(kind == "Q8_0" for kind, _ in found.values()) > 20
    for name, (kind, values) in found.items():
        wanted = state[name].float()
        if kind != "Q8_0":
            continue
        blocks, exact = values.reshape(-1, 32), wanted.reshape(-1, 32)
        step = exact.abs().amax(1, keepdim=True) / 127
        assert ((blocks - exact).abs() <= step * (0.5 + 127 * 2**-11) + 1e-7).all(), name
        assert name.startswith(("blocks.", "audio_injector."))


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("blocks.0.ffn.0.weight", (64, 32), "Q8_0"),
        ("blocks.0.ffn.0.weight", (64, 33), "BF16"),  # a row is no whole number of blocks
        ("blocks.0.ffn.0.bias", (64,), "F32"),
        ("blocks.0.norm3.weight", (64,), "F32"),
        ("blocks.0.modulation", (1, 6, 64), "F32"),
        ("patch_embedding.weight", (64, 16, 1, 2, 2), "BF16"),
        ("text_embedding.0.weight", (64, 32), "BF16"),
        ("time_projection.1.weight", (64, 32), "BF16"),
        ("trainable_cond_mask.weight", (3, 64), "BF16"),
        ("head.head.weight", (64, 32), "BF16"),
        ("casual_audio_encoder.encoder.conv2.conv.weight", (64, 32, 3), "BF16"),
    ],
)
def test_what_stays_exact_in_q8_0(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert storage(name, torch.Size(shape), "q8_0", LIVEAVATAR_IGNORE) == kind
    assert storage(name, torch.Size(shape), "bf16", LIVEAVATAR_IGNORE) == ("F32" if kind == "F32" else "BF16")


def test_metadata_tell_the_model(dit: LiveAvatar, tmp_path: Path) -> None:
    write_transformer(dit, tmp_path / "model.gguf", "q8_0", "small")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "wan" and fields["general.name"] == "small"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert (fields["wan.block_count"], fields["wan.embedding_length"], fields["wan.attention.head_count"]) == (2, 32, 2)
    config = json.loads(fields["kinora.config"])
    assert config["dim"] == 32 and config["rope_dtype"] == "float32"
    assert fields["comfy.gguf.orig_shape.patch_embedding.weight"] == [32, 4, 1, 2, 2]
    assert "comfy.gguf.orig_shape.head.head.weight" not in fields


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="type 'q4_0' is not known; use one of bf16, q8_0"):
        write({"a.weight": torch.zeros(2, 2)}, path, "q4_0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has 71 letters; GGUF holds names of at most 63"):
        write({f"{'a' * 64}.weight": torch.zeros(2, 2)}, path, "bf16")
    assert not path.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = str(write_model(tmp_path / "model")), tmp_path / "small.gguf"
    assert main(["export", "gguf", model, "--type", "q8_0", "-o", str(path)]) == 0
    assert re.search(
        r"wrote .*small.gguf: \d+ tensors BF16, \d+ tensors F32, \d+ tensors Q8_0", capsys.readouterr().out
    )
    assert main(["export", "gguf", model, "-o", str(path)]) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert main(["export", "gguf", model, "-o", str(tmp_path / "model.bin")]) == 2
    assert "name the file model.gguf" in capsys.readouterr().err
    assert main(["export", "gguf", model, "-o", str(tmp_path / "none" / "model.gguf")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_command_without_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", "gguf", str(write_model(tmp_path / "model")), "-o", str(tmp_path / "a.gguf")]) == 2
    assert 'install it with pip install "kinora[export]"' in capsys.readouterr().err


def test_fp8_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "export", "tiny", "--precision", "fp8", "-o", str(tmp_path / "tiny8")]) == 0
    assert main(["export", "gguf", str(tmp_path / "tiny8"), "-o", str(tmp_path / "t.gguf")]) == 2
    assert "is in FP8" in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.glob("*.gguf*"))
