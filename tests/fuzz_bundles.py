"""Damaged bundles, made from a seed, against both readers: an error with a message, or a sound bundle; never a crash.

In tests for some seconds; longer on demand, with new seeds until the time is over:

    python tests/fuzz_bundles.py --seconds 600 --seed 1

Each damaged bundle is opened and used by `fuzz_bundle.c` under AddressSanitizer and UBSan, files read into memory of
their exact size so that one byte too far is seen, and by the Python reader. Both must say the same: sound or not.
"""

import argparse
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kinora.checkpoints_tools.bundle import format as bundle_format
from kinora.checkpoints_tools.bundle.format import BundleError
from kinora.checkpoints_tools.bundle.read import Bundle
from kinora.checkpoints_tools.bundle.verify import verify
from kinora.checkpoints_tools.bundle.write import write_bundle

ROOT = Path(__file__).parents[1]
HEADER_FOLDER = ROOT / "checkpoints_tools" / "c"
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
IDX = bundle_format.INDEX_FILE
HOSTILE = (0, 1, 7, 63, 64, 4095, 4096, 65536, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FILES_AT, FILE_SIZE, TENSOR_SIZE = 64, 32, 128


@dataclass(frozen=True)
class Sample:
    """A sound bundle, small; where its tables lie."""

    folder: Path
    index: bytes
    files: int
    tensors: int

    @property
    def tensors_at(self) -> int:
        return FILES_AT + FILE_SIZE * self.files

    @property
    def order_at(self) -> int:
        return self.tensors_at + TENSOR_SIZE * self.tensors


def write_sample(folder: Path) -> Sample:
    """Two weight files, nine tensors: FP8 with scales, a scalar, an empty tensor, one that begins on a page."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    parts = {
        "dit": {
            "w.weight": draw(6, 10).to(torch.float8_e4m3fn),
            "w.weight_descale": draw(6, 1).abs() + 0.1,
            "w.bias": draw(6).bfloat16(),
            "page": draw(130, 128),
            "scalar": draw(1)[0],
            "single": draw(1),
            "flags": torch.tensor([True, False]),
        },
        "vae": {"conv": draw(2, 3, 1, 3, 3).half(), "none": torch.zeros(0, 4)},
    }
    write_bundle(folder, parts, {"model": "sample"})
    return Sample(folder, (folder / IDX).read_bytes(), 2, 9)


def damage(sample: Sample, target: Path, seed: int) -> str:
    """Write a damaged copy of the sample to `target`; says what was done."""
    rng = random.Random(seed)
    shutil.copytree(sample.folder, target)
    act = rng.choice(ACTS)
    return f"{act.__name__}: {act(sample, target, rng)}"


def cut(sample: Sample, target: Path, rng: random.Random) -> str:
    """A file ends too early, or has bytes too many."""
    path = target / rng.choice((IDX, "dit.safetensors", "vae.safetensors", "manifest.json"))
    data = path.read_bytes()
    length = rng.choice((0, 1, 8, rng.randrange(len(data)), len(data) - 1, len(data) + rng.randrange(1, 5000)))
    path.write_bytes(data[:length].ljust(length, b"\1"))
    return f"{path.name} to {length} bytes"


def flip(sample: Sample, target: Path, rng: random.Random) -> str:
    """Bits of any file, checksums left as they are."""
    path = target / rng.choice((IDX, "dit.safetensors", "vae.safetensors", "manifest.json"))
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits of {path.name}"


def remove(sample: Sample, target: Path, rng: random.Random) -> str:
    """A file is missing, or is a folder."""
    path = target / rng.choice((IDX, "dit.safetensors", "vae.safetensors", "manifest.json"))
    path.unlink()
    if rng.random() < 0.3:
        path.mkdir()
    return path.name


def _reseal(sample: Sample, target: Path, data: bytes | bytearray) -> None:
    """Write an index whose checksum fits, so that readers look at the rest of it."""
    (target / IDX).write_bytes(bundle_format.sealed(bytes(data)))


def noise(sample: Sample, target: Path, rng: random.Random) -> str:
    """Random bytes in the index, sealed."""
    data = bytearray(sample.index)
    start = rng.randrange(28, len(data))
    for i in range(start, min(start + rng.choice((1, 2, 4, 8, 64)), len(data))):
        data[i] = rng.randrange(256)
    _reseal(sample, target, data)
    return f"from byte {start}"


def header(sample: Sample, target: Path, rng: random.Random) -> str:
    """A hostile count, size or mark in the header, sealed."""
    data = bytearray(sample.index)
    at, kind = rng.choice(((8, "<I"), (12, "<I"), (16, "<Q"), (28, "<I"), (32, "<I"), (36, "<I"), (48, "<Q")))
    _poke(data, at, kind, rng)
    _reseal(sample, target, data)
    return f"field at {at}"


def file_record(sample: Sample, target: Path, rng: random.Random) -> str:
    """A hostile field of a file's record, sealed."""
    data = bytearray(sample.index)
    field, kind = rng.choice(((0, "<Q"), (8, "<I"), (12, "<I"), (16, "<Q"), (24, "<Q")))
    _poke(data, FILES_AT + FILE_SIZE * rng.randrange(sample.files) + field, kind, rng)
    _reseal(sample, target, data)
    return f"field {field}"


def tensor_record(sample: Sample, target: Path, rng: random.Random) -> str:
    """Hostile fields of tensors' records: offsets, sizes, shapes, ranks, scales, sealed."""
    data = bytearray(sample.index)
    fields = ((0, "<Q"), (8, "<I"), (12, "<I"), (16, "<I"), (20, "<I"), (24, "<Q"), (32, "<Q"), (40, "<I"), (44, "<I"))
    shapes = tuple((64 + 8 * axis, "<Q") for axis in range(8))
    told = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        number, (field, kind) = rng.randrange(sample.tensors), rng.choice(fields + shapes)
        _poke(data, sample.tensors_at + TENSOR_SIZE * number + field, kind, rng)
        told.append(f"{number}.{field}")
    _reseal(sample, target, data)
    return ", ".join(told)


def overlap(sample: Sample, target: Path, rng: random.Random) -> str:
    """A tensor begins where another lies, or beyond its file, sealed."""
    data = bytearray(sample.index)
    a, b = rng.sample(range(sample.tensors), 2)
    place = struct.unpack_from("<Q", data, sample.tensors_at + TENSOR_SIZE * b + 24)[0]
    struct.pack_into("<Q", data, sample.tensors_at + TENSOR_SIZE * a + 24, place + rng.choice((0, 64, -64, 1, 4096)))
    _reseal(sample, target, data)
    return f"{a} over {b}"


def grow(sample: Sample, target: Path, rng: random.Random) -> str:
    """A tensor whose shape and size agree, and reach to the end of its file, or beyond, sealed."""
    data = bytearray(sample.index)
    number = rng.randrange(sample.tensors)
    at = sample.tensors_at + TENSOR_SIZE * number
    file, code = struct.unpack_from("<2I", data, at + 12)
    offset = struct.unpack_from("<Q", data, at + 24)[0]
    end = struct.unpack_from("<Q", data, FILES_AT + FILE_SIZE * file + 16)[0]
    width = bundle_format.BY_CODE[code].itemsize
    count = max(0, (end - offset) // width + rng.choice((-1, 0, 1, 2, 64, 4096, 2**20, 2**40, 2**59)))
    struct.pack_into("<I", data, at + 20, 1)
    struct.pack_into("<Q", data, at + 32, count * width)
    struct.pack_into("<8Q", data, at + 64, count, 0, 0, 0, 0, 0, 0, 0)
    _reseal(sample, target, data)
    return f"tensor {number} to {count} numbers"


def scale(sample: Sample, target: Path, rng: random.Random) -> str:
    """A scale that is no tensor, or one that cannot be it, sealed."""
    data = bytearray(sample.index)
    at = sample.tensors_at + TENSOR_SIZE * rng.randrange(sample.tensors) + 44
    struct.pack_into("<I", data, at, rng.choice((*range(sample.tensors + 2), 2**31, 2**32 - 2)))
    _reseal(sample, target, data)
    return f"at {at}"


def product(sample: Sample, target: Path, rng: random.Random) -> str:
    """Shapes whose product wraps around to the right size, sealed."""
    data = bytearray(sample.index)
    number = rng.randrange(sample.tensors)
    at = sample.tensors_at + TENSOR_SIZE * number
    size = struct.unpack_from("<Q", data, at + 32)[0]
    shapes = ((2**32, 2**32, size), (2**63, 2, 1), (2**61 + size // 4, 4, 1), (0, 2**62, 2**62), (2**64 - 1, 1, 1))
    struct.pack_into("<I", data, at + 20, 3)
    struct.pack_into("<8Q", data, at + 64, *rng.choice(shapes), 0, 0, 0, 0, 0)
    if rng.random() < 0.5:
        struct.pack_into("<Q", data, at + 32, rng.choice((0, size, 2**63, 2**64 - 4)))
    _reseal(sample, target, data)
    return f"tensor {number}"


def strings(sample: Sample, target: Path, rng: random.Random) -> str:
    """Names without end, empty, with odd bytes, equal, or leading out of the folder, sealed."""
    data = bytearray(sample.index)
    start = sample.order_at + 4 * sample.tensors + 4 * (sample.tensors % 2)
    kind = rng.randrange(4)
    if kind == 0:  # no zero byte any more, at some end or at all
        ends = [i for i in range(start, len(data)) if not data[i]]
        for i in ends if rng.random() < 0.5 else rng.sample(ends, 1):
            data[i] = ord("x")
    elif kind == 1:
        data[rng.randrange(start, len(data))] = rng.choice((0, 1, 10, 32, 34, 127, 128, 255))
    elif kind == 2:
        data[start : start + 15] = rng.choice((b"../safetensors\0", b"a/b.safetensors", b"dit.safetensor\0"))[:15]
    else:
        record = rng.randrange(sample.tensors), rng.randrange(sample.tensors)
        a, b = (sample.tensors_at + TENSOR_SIZE * number for number in record)
        data[a : a + 12] = data[b : b + 12]
    _reseal(sample, target, data)
    return f"kind {kind}"


def order(sample: Sample, target: Path, rng: random.Random) -> str:
    """The numbers by name point outside, twice to one tensor, or in another order, sealed."""
    data = bytearray(sample.index)
    at = sample.order_at + 4 * rng.randrange(sample.tensors)
    struct.pack_into("<I", data, at, rng.choice((sample.tensors, 2**32 - 1, rng.randrange(sample.tensors))))
    _reseal(sample, target, data)
    return f"at {at}"


def weight_header(sample: Sample, target: Path, rng: random.Random) -> str:
    """Another length in front of a weight file."""
    path = target / rng.choice(("dit.safetensors", "vae.safetensors"))
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 0, rng.choice(HOSTILE))
    path.write_bytes(data)
    return path.name


def _poke(data: bytearray, at: int, kind: str, rng: random.Random) -> None:
    """Replace a field by a hostile value, or by one a little off."""
    limit = 2 ** (8 * struct.calcsize(kind))
    value = rng.choice(HOSTILE) if rng.random() < 0.6 else struct.unpack_from(kind, data, at)[0] + rng.choice((-1, 1))
    struct.pack_into(kind, data, at, value % limit)


ACTS: tuple[Callable[[Sample, Path, random.Random], str], ...] = (
    *(
        cut,
        flip,
        remove,
        noise,
        header,
        file_record,
        tensor_record,
        overlap,
        grow,
        scale,
        product,
        strings,
        order,
        weight_header,
    ),
)


def build_driver(compiler: str, target: Path, extra: tuple[str, ...] = ()) -> Path:
    """Compile `fuzz_bundle.c` under the sanitizers."""
    source = ROOT / "tests" / "fuzz_bundle.c"
    command = [compiler, *STRICT, *SANITIZE, *extra, "-DKINORA_BUNDLE_READ", "-I", str(HEADER_FOLDER), str(source)]
    subprocess.run([*command, "-o", str(target)], check=True)
    return target


def python_says(folder: Path) -> tuple[str, str]:
    """("open", why) when a bundle cannot be opened, ("bytes", what) when its checksums do not fit, or ("sound", "").

    Any exception but BundleError is a failure.
    """
    try:
        bundle = Bundle.open(folder)
    except BundleError as error:
        return "open", str(error)
    bytes_differ = ("damaged", "bytes before", "bytes behind")  # C reads no JSON, and judges no values
    found = [problem for problem in verify(bundle).problems if any(words in problem for words in bytes_differ)]
    return ("bytes", "; ".join(found)) if found else ("sound", "")


def run(driver: Path, sample: Sample, first_seed: int, count: int, folder: Path) -> list[str]:
    """Damage and read `count` bundles; returns what the C reader said of each, "" for sound.

    Raises AssertionError when a reader crashed, or when they differ in whether a bundle opens, or is sound.
    """
    targets = [folder / str(seed) for seed in range(first_seed, first_seed + count)]
    acts = [damage(sample, target, first_seed + i) for i, target in enumerate(targets)]
    environment = os.environ | {"ASAN_OPTIONS": "abort_on_error=0:allocator_may_return_null=1"}
    ran = subprocess.run([str(driver), *map(str, targets)], capture_output=True, text=True, env=environment)
    lines = ran.stdout.splitlines()
    if ran.returncode or len(lines) != count:
        last = acts[min(len(lines), count - 1)]
        raise AssertionError(f"the C reader failed at seed {first_seed + len(lines)} ({last}):\n{ran.stderr[-3000:]}")
    verdicts = []
    for i, (target, line) in enumerate(zip(targets, lines, strict=True)):
        status, _, message = line.partition(" ")
        verdict, told = python_says(target)
        c_verdict = {0: "sound", 4: "bytes"}.get(int(status), "open")
        if verdict != c_verdict and "manifest.json" not in acts[i]:
            raise AssertionError(f"seed {first_seed + i} ({acts[i]}): C says {line!r}, Python {verdict} {told!r}")
        if verdict != "sound" and not told:
            raise AssertionError(f"seed {first_seed + i} ({acts[i]}): an error without a message")
        verdicts.append(message)
        shutil.rmtree(target)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--compiler", default="cc")
    args = parser.parse_args()
    stop, seed = time.monotonic() + args.seconds, args.seed
    messages: set[str] = set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        driver, sample = build_driver(args.compiler, folder / "fuzz_bundle"), write_sample(folder / "sample")
        while time.monotonic() < stop:
            messages |= set(run(driver, sample, seed, 200, folder))
            seed += 200
    print(f"{seed - args.seed} damaged bundles, {len(messages)} different messages, no crash")
    return 0


if __name__ == "__main__":
    sys.exit(main())
