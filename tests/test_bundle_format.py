"""A reader written from docs/bundles.md alone, with struct and zlib and no line of the package: the page suffices."""

import json
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

TINY = Path(__file__).parents[1] / "runtime" / "assets" / "tiny" / "tiny.safetensors"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
CODES = dict(enumerate(SIZES, 1))
NONE = 0xFFFFFFFF
EXPORT = "import sys; from kinora.runtime.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class Found:
    """A tensor as the page describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    offset: int
    scale: str | None = None


def u32(data: bytes, at: int) -> int:
    return struct.unpack_from("<I", data, at)[0]


def u64(data: bytes, at: int) -> int:
    return struct.unpack_from("<Q", data, at)[0]


def read_bundle(folder: Path) -> dict[str, Found]:
    """Every tensor of a bundle, checked as the page says."""
    index = (folder / "bundle.idx").read_bytes()
    assert index[:8] == b"KINORAIX" and u32(index, 8) == 0x01020304 and u32(index, 12) == 1
    assert u64(index, 16) == len(index) and u32(index, 24) == zlib.crc32(index[28:])
    files, tensors, strings_size = u32(index, 28), u32(index, 32), u64(index, 48)
    assert (u32(index, 36), u32(index, 40), u32(index, 44), u64(index, 56)) == (64, 4096, 0, 0)
    tensors_at = 64 + 32 * files
    order_at = tensors_at + 128 * tensors
    strings_at = order_at + 4 * tensors + 4 * (tensors % 2)
    assert strings_at + strings_size == len(index)

    def name(record: int) -> str:
        start = strings_at + u64(index, record)
        end = start + u32(index, record + 8)
        assert index[end] == 0
        return index[start:end].decode("ascii")

    held: list[tuple[str, bytes, int]] = []
    for i in range(files):
        at = 64 + 32 * i
        data = (folder / name(at)).read_bytes()
        begin = u64(index, at + 24)
        assert len(data) == u64(index, at + 16) and begin == 8 + u64(data, 0) and begin % 4096 == 0
        assert zlib.crc32(data[:begin]) == u32(index, at + 12)
        held.append((name(at), data, begin))
    assert [file[0] for file in held] == sorted(file[0] for file in held)

    names, found, before = [], {}, (0, 0)
    for i in range(tensors):
        at = tensors_at + 128 * i
        file, dtype, rank = u32(index, at + 12), CODES[u32(index, at + 16)], u32(index, at + 20)
        offset, size = u64(index, at + 24), u64(index, at + 32)
        sides = struct.unpack_from("<8Q", index, at + 64)
        assert not any(sides[rank:]) and u64(index, at + 48) == u64(index, at + 56) == 0
        assert size == int(np.prod(sides[:rank], dtype=object)) * SIZES[dtype]
        assert offset % (4096 if size >= 65536 else 64) == 0 and (file, offset) >= before
        before = file, offset + size
        data = held[file][1][offset : offset + size]
        assert len(data) == size and zlib.crc32(data) == u32(index, at + 40)
        assert name(at).startswith(held[file][0].removesuffix("safetensors"))
        names.append(name(at))
        found[name(at)] = Found(held[file][0], dtype, sides[:rank], data, offset)
    for i in range(tensors):
        scale = u32(index, tensors_at + 128 * i + 44)
        found[names[i]].scale = None if scale == NONE else names[scale]
    assert [names[u32(index, order_at + 4 * i)] for i in range(tensors)] == sorted(names)
    return found


def read_safetensors(path: Path) -> dict[str, Found]:
    """The entries of a weight file by its JSON header; spaces between tensors are checked to be zero."""
    data = path.read_bytes()
    begin = 8 + u64(data, 0)
    header = json.loads(data[8:begin])
    assert header.pop("__metadata__") == {"format": "pt", "kinora_part": path.stem}
    found = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        content = data[begin + start : begin + end]
        if key.startswith("__pad."):
            assert entry["dtype"] == "U8" and not any(content)
        else:
            found[f"{path.stem}.{key}"] = Found(
                path.name, entry["dtype"], tuple(entry["shape"]), content, begin + start
            )
    return found


def e4m3(codes: np.ndarray) -> np.ndarray:
    """F8_E4M3 as the page describes it."""
    sign, exponent, mantissa = np.where(codes & 0x80, -1.0, 1.0), (codes >> 3) & 15, (codes & 7).astype(np.float64)
    return sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


@pytest.fixture(scope="module", params=["float32", "fp8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, exported by the program in a process of its own."""
    folder = tmp_path_factory.mktemp("bundles") / request.param
    command = ["bundle", "export", "tiny", "--precision", request.param, "--tables", "-o", str(folder)]
    subprocess.run([sys.executable, "-c", EXPORT, *command], check=True)
    return folder


def test_the_page_suffices_to_read_a_bundle(bundle: Path) -> None:
    found = read_bundle(bundle)
    listed: dict[str, Found] = {}
    for path in sorted(bundle.glob("*.safetensors")):
        listed |= read_safetensors(path)
    assert listed.keys() == found.keys() and len(found) > 400
    for key, entry in listed.items():
        same = found[key]
        assert (entry.dtype, entry.shape, entry.data, entry.offset) == (same.dtype, same.shape, same.data, same.offset)


def test_the_values_are_those_of_the_model(bundle: Path) -> None:
    """Against the embedded file, read by numpy: exact in float32, to e4m3's 4 bits where the page's rule is applied."""
    original = load_file(TINY)
    found, quantised = read_bundle(bundle), 0
    for key, value in original.items():
        if key not in found:
            pytest.fail(f"{key} is not in the bundle")
        entry = found[key]
        if entry.scale is not None:
            scale = np.frombuffer(found[entry.scale].data, "<f4").astype(np.float64)
            ours = e4m3(np.frombuffer(entry.data, np.uint8)).reshape(entry.shape) * scale[:, None]
            assert np.linalg.norm(ours - value) < 0.03 * np.linalg.norm(value)
            quantised += 1
        elif entry.dtype == "F32":
            assert np.array_equal(np.frombuffer(entry.data, "<f4").reshape(entry.shape), value.astype(np.float32))
        else:
            assert entry.dtype == "BF16"
            bits = np.frombuffer(entry.data, "<u2").astype(np.uint32) << 16
            assert np.allclose(bits.view(np.float32).reshape(entry.shape), value, rtol=2**-8, atol=0)
    assert bool(quantised) == (bundle.name == "fp8")


def test_the_manifest_is_what_the_page_says(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["precision"]) == ("kinora-bundle", 1, bundle.name)
    assert manifest["parts"].keys() == {"dit", "vae", "speech", "text"}
    assert manifest["files"].keys() == {p.name for p in bundle.iterdir()} - {"manifest.json"}
    assert {source["path"] for source in manifest["sources"]} == {"config.json", "tiny.safetensors"}
    assert ("recipe" in manifest) == (bundle.name == "fp8")
