"""`kinora inspect`: what files are, from their headers alone; what is wrong with them, by name."""

import json
import struct
from collections import Counter
from collections.abc import Callable, KeysView
from pathlib import Path

import pytest
import torch
from kinora.checkpoints_tools.bundle.layout import PAD, SCALE_ENDING
from kinora.checkpoints_tools.bundle.read import Bundle
from kinora.checkpoints_tools.inspect import inspect_path
from kinora.checkpoints_tools.read import UnreadableFile
from kinora.checkpoints_tools.sources import Weights
from kinora.runtime.bundles import export_bundle
from kinora.runtime.cli import main
from published_keys import LIVEAVATAR, LIVEAVATAR_LORA, Shapes, listed, transcribed
from safetensors.torch import load_file, save_file
from torch import Tensor

SPEECH, VAE, TEXT = "wav2vec2_large_xlsr_53_english_ctc", "wan21_vae", "umt5_xxl_encoder"
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def sparse(path: Path, shapes: Shapes, dtype: str = "BF16", short: int = 0, **metadata: str) -> Path:
    """A safetensors file of the real shapes that takes no disk; `short` bytes miss at its end. Scales are F32."""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        kind = "F32" if name.endswith(SCALE_ENDING) else dtype
        size = SIZES[kind] * torch.Size(shape).numel()
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end - short)
    return path


def sharded(folder: Path, shapes: Shapes, parts: int = 4, index: bool = True) -> None:
    keys, table = list(shapes), {}
    for part in range(parts):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-{parts:05d}.safetensors"
        sparse(folder / file, {key: shapes[key] for key in keys[part::parts]})
        table |= dict.fromkeys(keys[part::parts], file)
    if index:
        path = folder / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": table}))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no cell of the table is folded."""
    monkeypatch.setenv("COLUMNS", "220")


@pytest.fixture(scope="module")
def liveavatar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the published LiveAvatar: every tensor of its real shape, in files without content."""
    root = tmp_path_factory.mktemp("published") / "Wan2.2-S2V-14B"
    sharded(root, transcribed(LIVEAVATAR))
    sparse(root / "Live-Avatar" / "liveavatar.safetensors", transcribed(LIVEAVATAR_LORA))
    sparse(root / "models_t5.safetensors", listed(TEXT))
    sparse(root / "vae.safetensors", listed(VAE), "F32")
    sparse(root / "wav2vec2-large-xlsr-53-english" / "model.safetensors", listed(SPEECH), "F32")
    (root / "config.json").write_text("{}")
    (root / ".cache").mkdir()
    (root / ".cache" / "part.safetensors").write_bytes(b"")
    return root


def test_a_whole_checkpoint(liveavatar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_path(liveavatar)
    assert report.complete and report.systems == {"LiveAvatar": ()}
    assert {file.part: (file.parameters, file.shards) for file in report.files} == {
        "Wan2.2-S2V-14B": (16_295_755_609, 4),
        "LiveAvatar LoRA": (676_331_520, 1),
        "UMT5-XXL encoder": (5_680_910_336, 1),
        "Wan2.1 VAE": (126_892_531, 1),
        "wav2vec2-large-xlsr-53": (315_472_545, 1),
    }
    assert report.files[0].dtypes == {torch.bfloat16: 1260} and report.files[0].bytes == 2 * 16_295_755_609
    assert main(["inspect", str(liveavatar)]) == 0
    out = capsys.readouterr().out
    assert "16.296 B" in out and "LiveAvatar: every part is here" in out


def test_what_is_wrong_is_printed_and_leaves_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = transcribed(LIVEAVATAR)
    for key in [key for key in shapes if key.startswith("blocks.39.")]:
        del shapes[key]
    shapes["head.head.bias"] = (63,)
    sparse(tmp_path / "model.safetensors", shapes | {"step": (1,)})
    sparse(tmp_path / "vae.safetensors", listed(VAE), "F32", short=1000)
    save_file({"hello": torch.ones(2)}, tmp_path / "other.safetensors")
    assert main(["inspect", str(tmp_path)]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "27 missing: blocks.39.modulation" in out and "(--full lists all)" in out
    assert "1 unexpected: step" in out and "head.head.bias [63], expected [64]" in out
    assert "1,000 bytes are missing at its end" in out and "no checkpoint that is known" in out
    assert "LiveAvatar: lacks LiveAvatar LoRA, UMT5-XXL encoder, Wan2.1 VAE, wav2vec2-large-xlsr-53" in out
    assert main(["inspect", str(tmp_path / "model.safetensors"), "--full"]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "blocks.39.ffn.2.bias" in out and "--full lists all" not in out


def test_shards_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path, transcribed(LIVEAVATAR), parts=3, index=False)
    first = tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors"
    sparse(tmp_path / "other-00001-of-00001.safetensors", {"hello": (2,)})
    report, other = inspect_path(tmp_path).files
    assert report.complete and report.shards == 3 and report.name == "diffusion_pytorch_model.safetensors"
    assert inspect_path(first).files == (report,) and other.shards == 1
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    for path in (tmp_path, first):
        assert "of 3 shards number 2 is not there" in inspect_path(path).files[0].trouble


def test_precision_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sparse(tmp_path / "vae.safetensors", listed(VAE), "F8_E4M3")
    (report,) = inspect_path(path).files
    assert report.precision == "float8_e4m3fn x 194" and report.complete
    assert main(["inspect", str(path)]) == 0
    assert "0.127 B" in capsys.readouterr().out


def test_pickles_are_looked_at_and_never_run(tmp_path: Path) -> None:
    state = {key: torch.zeros(shape, dtype=torch.uint8) for key, shape in list(listed(VAE).items())[:150]}
    torch.save(state, tmp_path / "vae.pth")
    torch.save({"w": torch.ones(1), "hook": print}, tmp_path / "code.pt")
    torch.save({"lr": 1}, tmp_path / "optimizer.pt")  # what a trainer keeps beside the weights
    code, vae = inspect_path(tmp_path).files
    assert "never executed" in code.trouble
    assert vae.part == "Wan2.1 VAE" and len(vae.missing) == 44


def test_the_embedded_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from kinora.runtime.load import TINY_FOLDER
    from safetensors.torch import load_file

    assert main(["inspect", "tiny"]) == 0
    assert "a small LiveAvatar" in " ".join(capsys.readouterr().out.split())
    state = load_file(TINY_FOLDER / "tiny.safetensors")
    lost = next(iter(state))
    del state[lost]
    save_file(state, tmp_path / "tiny.safetensors")
    (tmp_path / "config.json").write_text((TINY_FOLDER / "config.json").read_text())
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"1 missing: {lost}" in capsys.readouterr().out


def test_places_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnreadableFile, match="holds no weight files"):
        inspect_path(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no weight files" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "no")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err
    assert main(["inspect", "Nobody/Nothing"]) == 2
    assert "nothing was downloaded" in capsys.readouterr().err


def test_a_file_without_tensors(tmp_path: Path) -> None:
    (report,) = inspect_path(sparse(tmp_path / "empty.safetensors", {})).files
    assert not report.what and not report.trouble and report.tensors == 0


def test_a_bundle_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "export", "tiny", "-o", str(tmp_path / "tiny")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "tiny")]) == 0
    told = capsys.readouterr().out
    assert "a bundle" in told and "dit.safetensors" in told and "BF16" in told
    (tmp_path / "tiny" / "bundle.idx").write_bytes(b"not an index")
    assert main(["inspect", str(tmp_path / "tiny")]) == 2


@pytest.mark.parametrize("precision", ["float32", "fp8"])
def test_one_file_of_a_bundle(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tensors are those of the index: the bytes between them are none."""
    folder = export_bundle("tiny", tmp_path / "b", precision=precision, device="cpu")
    opened = Bundle.open(folder)
    for part in opened.parts:
        (report,) = inspect_path(folder / f"{part}.safetensors").files
        records = opened.records(part).values()
        assert report.complete and report.what == f"part {part} of a bundle"
        assert report.dtypes == Counter(record.dtype.torch for record in records)
        assert report.bytes == sum(record.size for record in records)
    assert PAD in (folder / "vae.safetensors").read_bytes()[:100_000].decode("latin1")
    assert main(["inspect", str(folder / "vae.safetensors")]) == 0
    assert "part vae of a bundle" in " ".join(capsys.readouterr().out.split())


def test_a_part_of_a_bundle_is_compared_with_what_is_published(tmp_path: Path) -> None:
    shapes = transcribed(LIVEAVATAR)
    scales = {f"{key}_descale": (shape[0], 1) for key, shape in shapes.items() if key.endswith("ffn.0.weight")}
    own = shapes | scales
    pads = {f"{PAD}{i}": (96,) for i in range(9)}
    path = sparse(tmp_path / "dit.safetensors", own | pads, kinora_part="dit", format="pt")
    report = inspect_path(path)
    (file,) = report.files
    assert file.what.startswith("part dit of a bundle: Wan2.2-S2V-14B") and file.complete
    assert file.tensors == len(own) and len(scales) == 40 and report.systems == {}
    del own["blocks.7.ffn.0.weight"]  # its scales then belong to nothing
    (file,) = inspect_path(sparse(path, own | pads, kinora_part="dit")).files
    assert file.missing == ("blocks.7.ffn.0.weight",) and file.unexpected == ("blocks.7.ffn.0.weight_descale",)
    (file,) = inspect_path(sparse(path, shapes | pads)).files  # of no bundle: tensors like any other
    assert file.what.startswith("Wan2.2-S2V-14B") and len(file.unexpected) == 9


@pytest.fixture
def fp8_bundle(tmp_path: Path) -> Path:
    return export_bundle("tiny", tmp_path / "b", precision="fp8", device="cpu")


def changed(file: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A file of a bundle, written once more by the library with other tensors."""
    state = {key: value for key, value in load_file(file).items() if not key.startswith(PAD)}
    change(state)
    save_file(state, file, {"kinora_part": file.stem, "format": "pt"})
    return file


LOST, SCALES = "blocks.1.ffn.0.weight", "blocks.1.ffn.0.weight_descale"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop(LOST), f"1 missing: {LOST}"),
        (lambda state: state.pop(SCALES), f"1 missing: {SCALES}"),
        (lambda state: state.update(more=torch.ones(2)), "1 unexpected: more"),
        (
            lambda state: state.update({"head.head.bias": torch.ones(3)}),
            "1 of another shape or type: head.head.bias float32 [3], expected bfloat16 [",
        ),
    ],
)
def test_a_file_of_a_bundle_is_compared_with_the_index(
    change: Callable[[dict[str, Tensor]], object], told: str, fp8_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed(fp8_bundle / "dit.safetensors", change)
    assert main(["inspect", str(file)]) == 2
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_file_that_nothing_is_known_of_is_not_compared(fp8_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its bundle's index; weights without their scales are found all the same."""
    file, index = fp8_bundle / "dit.safetensors", fp8_bundle / "bundle.idx"
    index.rename(fp8_bundle / "index")
    (report,) = inspect_path(file).files
    assert not (report.compared or report.complete or report.differences)
    assert main(["inspect", str(file)]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "not compared" in out and "put the bundle's bundle.idx beside it" in out
    (report,) = inspect_path(changed(file, lambda state: state.pop(SCALES))).files
    assert report.missing == (SCALES,)
    index.write_bytes(b"not an index")
    (report,) = inspect_path(file).files
    assert "bundle.idx: 12 bytes cannot be an index" in report.trouble
    (fp8_bundle / "index").rename(index)
    (report,) = inspect_path(sparse(fp8_bundle / "x.safetensors", {"w": (2,)}, kinora_part="x")).files
    assert "bundle.idx knows no x.safetensors" in report.trouble


def test_names_are_looked_up_and_not_gone_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of all names for every name would take as long as their square."""
    listings = 0

    class Counting(Weights):
        def keys(self) -> KeysView[str]:
            nonlocal listings
            listings += 1
            return super().keys()

    monkeypatch.setattr("kinora.checkpoints_tools.inspect.Weights", Counting)
    names = {f"layer.{i}.weight": (2, 2) for i in range(300)}
    path = sparse(tmp_path / "dit.safetensors", names, kinora_part="dit")
    (report,) = inspect_path(path).files
    assert report.tensors == 300 and listings < 10
