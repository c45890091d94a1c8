"""Bundles of whole models: written whole or not at all, loaded bit for bit, verified, refused when they are damaged."""

import hashlib
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import left
from kinora.checkpoints_tools.bundle import device as reading
from kinora.checkpoints_tools.bundle import write as writing
from kinora.checkpoints_tools.bundle.device import Piece, cut, fill, read_to_device, scatter
from kinora.checkpoints_tools.bundle.format import BundleError, read_index
from kinora.checkpoints_tools.bundle.layout import PAD, execution_order
from kinora.checkpoints_tools.bundle.read import Bundle
from kinora.checkpoints_tools.bundle.verify import verify
from kinora.checkpoints_tools.bundle.write import AHEAD, tensor_bytes, write_at, write_bundle
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.graphs.quantize import Fp8Linear, quantize_linears
from kinora.runtime import Avatar, load
from kinora.runtime.bundles import export_bundle, open_bundle, schedule_tables, verify_bundle
from kinora.runtime.errors import InputError, OutputError
from kinora.runtime.systems.liveavatar_step import DenoisingStep
from published_folder import make_text_small, write_published
from safetensors.torch import load_file
from small_model import write_model
from torch import Tensor

VOICE = (0.1 * np.random.default_rng(1).standard_normal(8000)).astype(np.float32)
PICTURE = np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "small-fp8", precision="fp8", device="cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    make_text_small(monkeypatch)


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
def test_the_published_layout_with_its_encoders(precision: str, published: Path, tmp_path: Path) -> None:
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


def test_one_prompt_instead_of_the_text_encoder(published: Path, tmp_path: Path) -> None:
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


def test_a_reader_that_fails_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not after what they have left to read; with a GPU that does nothing."""

    class Silent:
        def __init__(self, *_: object) -> None: ...

        def synchronize(self) -> None: ...

        def record(self, stream: object) -> None: ...

    cuda = SimpleNamespace(Stream=Silent, Event=Silent, stream=nullcontext, current_stream=Silent)
    gpu = SimpleNamespace(cuda=cuda, uint8=torch.uint8, empty=lambda count, dtype, pin_memory: torch.empty(count))
    read, broken = [], threading.Event()

    def fill_or_fail(_: int, __: Tensor, piece: Piece, path: Path) -> None:
        if piece.start == 1:
            broken.set()
            raise BundleError(f"{path} ends")
        broken.wait(5)
        time.sleep(0.002)
        read.append(piece)

    monkeypatch.setattr(reading, "torch", gpu)
    monkeypatch.setattr(reading, "fill", fill_or_fail)
    (tmp_path / "dit.safetensors").write_bytes(b"")
    pieces = [Piece(at, at + 1, ()) for at in range(300)]
    with pytest.raises(BundleError, match="ends"):
        reading._copy(tmp_path / "dit.safetensors", pieces, {}, torch.device("cuda"))
    assert len(read) < 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_bytes_of_the_file(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for part in opened.parts:
        made = read_to_device(opened, part, torch.device("cuda"))
        assert all(equal(made[key].cpu(), value) for key, value in opened.mapped(part).items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu_are_written_as_those_of_the_cpu(tmp_path: Path) -> None:
    """Also while a stream of the caller's is still making them, for half a second and more."""
    tensors = {f"w{i}": torch.randn(1 + i, 4000) for i in range(200)}
    halves = {key: value.cuda() for key, value in tensors.items()}
    torch.mul(halves["w0"], 2)  # a kernel that is loaded later would wait for the stream
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1_000_000_000)  # cycles
        on_gpu = {key: 2 * value for key, value in halves.items()}
        assert not torch.cuda.current_stream().query()
        made = write_bundle(tmp_path / "gpu", {"dit": on_gpu}, {"model": "x"})
    wanted = write_bundle(tmp_path / "cpu", {"dit": {key: 2 * value for key, value in tensors.items()}}, {"model": "x"})
    for name in ("dit.safetensors", "bundle.idx", "manifest.json"):
        assert (made / name).read_bytes() == (wanted / name).read_bytes(), name


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


def test_a_write_that_fails_in_another_thread_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes | memoryview, offset: int) -> None:
        if offset >= 65536:
            raise OSError(28, "No space left on device")
        write_at(descriptor, data, offset)

    monkeypatch.setattr(writing, "write_at", full)
    tensors = {f"w{i}": torch.randn(64, 64) for i in range(40)}
    with pytest.raises(BundleError, match=r"could not be written \(No space left on device\)"):
        write_bundle(tmp_path / "b", {"dit": tensors}, {})
    assert left(tmp_path) == []


def test_no_call_writes_more_than_a_system_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GiB and more are refused by macOS; memory that nothing touches, and a write that stops short now and then."""
    written: list[tuple[int, int]] = []

    def pwrite(_: int, data: memoryview, offset: int) -> int:
        assert len(data) < 1 << 31
        written.append((offset, min(len(data), 700_000_000)))
        return written[-1][1]

    monkeypatch.setattr("os.pwrite", pwrite)
    size = (1 << 31) + 5
    with mmap.mmap(-1, size) as memory, memoryview(memory) as data:
        write_at(0, data, 100)
    assert [start for start, _ in written] == [100 + 700_000_000 * i for i in range(4)]
    assert sum(count for _, count in written) == size


@pytest.mark.parametrize("existing", [False, True])
def test_everything_is_on_the_disk_before_it_has_its_name(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, done = {"dit": {"w": torch.ones(3)}}, []
    words = tmp_path / "words.json"
    words.write_text("{}")
    fsync, rename = os.fsync, Path.rename

    def noting_fsync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noting_rename(path: Path, target: Path) -> Path:
        done.append(f"{target.name} is new" if target.name == "b" else "the old one is aside")
        return rename(path, target)

    if existing:
        write_bundle(tmp_path / "b", tensors, {"model": "x"})
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    folder = write_bundle(
        tmp_path / "b", tensors, {"model": "x"}, copies={"tokenizer/words.json": words}, overwrite=existing
    )
    before, after = done[: done.index("b is new")], done[done.index("b is new") :]
    wanted = {path.relative_to(tmp_path): path.stat().st_ino for path in (folder, *folder.rglob("*"))}
    assert len(wanted) == 7 and not [name for name, inode in wanted.items() if inode not in before]
    assert tmp_path.stat().st_ino in after


def test_tensors_are_copied_ahead_but_not_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is not written before the fourth is on its way; no more than a few are in memory at once."""
    copied, released, most, lock = 0, 0, 0, threading.Lock()
    fourth = threading.Event()

    def copy(tensor: Tensor) -> memoryview:
        nonlocal copied, most
        with lock:
            copied += 1
            most = max(most, copied - released)
            if copied == 4:
                fourth.set()
        return tensor_bytes(tensor)

    def write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
        nonlocal released
        if isinstance(data, memoryview):  # no header
            assert fourth.wait(60), "nothing is copied while a tensor is written"
            with lock:
                released += 1
        write_at(descriptor, data, offset)

    monkeypatch.setattr(writing, "tensor_bytes", copy)
    monkeypatch.setattr(writing, "write_at", write)
    tensors = {f"w{i}": torch.randn(3, 50) for i in range(50)} | {"none": torch.zeros(0, 3)}
    made = Bundle.open(write_bundle(tmp_path / "b", {"dit": tensors}, {"model": "x"}))
    assert copied == 51 and 4 <= most <= 2 * AHEAD + 1
    assert all(equal(value, tensors[key]) for key, value in made.mapped("dit").items())
    assert not verify(made).problems


def test_the_bytes_of_a_file_are_those_of_the_format(tmp_path: Path) -> None:
    """Put together once more from docs/bundles.md: header, zeros up to the next 64 or 4096 bytes, tensors."""
    tensors = {"a": torch.randn(5), "page": torch.randn(130, 128), "b": torch.ones(3).bool(), "none": torch.zeros(0)}
    folder = write_bundle(tmp_path / "b", {"dit": tensors}, {"model": "x"})
    raw = (folder / "dit.safetensors").read_bytes()
    data = bytearray()
    for value in tensors.values():
        data += bytes(-len(data) % (4096 if value.nbytes >= 65536 else 64)) + value.numpy().tobytes()
    head = 8 + int.from_bytes(raw[:8], "little")
    assert raw[head:] == data
    said = json.loads((folder / "manifest.json").read_text())["files"]["dit.safetensors"]
    assert said == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    index = read_index(folder)
    assert index.files[0].checksum == zlib.crc32(raw[:head])
    assert all(t.checksum == zlib.crc32(raw[t.offset : t.end]) for t in index.tensors)


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


def test_the_benchmark_loads_what_it_wrote(tmp_path: Path) -> None:
    """On the CPU, with the embedded model, in the process of its own that the GPU gets too."""
    from kinora.bench.bundles import main as bench

    out = tmp_path / "bundles.json"
    assert bench(["--model", "tiny", "--device", "cpu", "--folder", str(tmp_path / "b"), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["write"]["alone_gb_per_second"].keys() == {"copy", "sha256", "crc32", "disk"}
    loaded = report["load"]
    assert loaded["equal_to_the_files"] and loaded["finite"] and len(loaded["seconds"]) == 3
    assert loaded["host_growth_bytes"] > 0  # its own growth, whatever this process took before it started it
    assert loaded["parts_seconds"].keys() == {"dit", "vae", "speech", "text"}
    assert loaded["bytes"] < report["write"]["bytes"] and left(tmp_path) == ["bundles.json"]
