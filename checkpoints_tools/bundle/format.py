"""The binary index of a bundle, `bundle.idx`: what it holds, how it is written, and every rule that a reader checks.

`docs/bundles.md` has the layout byte by byte, `c/kinora_bundle.h` reads the same in C; both number the rules as here.
Little-endian throughout. A tensor's name in the index is `<part>.<key>`, its part being the file `<part>.safetensors`.
"""

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

INDEX_FILE = "bundle.idx"
MANIFEST_FILE = "manifest.json"
WEIGHTS_ENDING = ".safetensors"

MAGIC = b"KINORAIX"
ENDIAN_MARK = 0x01020304
VERSION = 1
ALIGNMENT = 64  # bytes to whose multiple every tensor is aligned in its file
PAGE = 4096  # likewise for the data of a file, and for every tensor of PAGED bytes or more
PAGED = 65536
MAX_RANK = 8
MAX_FILES = 1024
MAX_INDEX_BYTES = 1 << 28
NO_SCALE = 0xFFFFFFFF

HEADER = struct.Struct("<8sIIQIIIIIIQQ")  # magic, mark, version, size, checksum, files, tensors, 64, 4096, 0, strings
FILE = struct.Struct("<QIIQQ")  # name offset, name size, checksum of the header, file size, data offset
TENSOR = struct.Struct("<QIIIIQQIIQQ8Q")  # name, file, dtype, rank, offset, size, checksum, scale, 0, 0, shape
CHECKED_FROM = 28  # the index's own checksum covers everything behind it


class BundleError(ValueError):
    """A bundle that cannot be read or written, or breaks the format; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Dtype:
    """A type of numbers: its code in the index, its name in safetensors, its torch dtype and bytes a number."""

    code: int
    name: str
    torch: torch.dtype

    @property
    def itemsize(self) -> int:
        return self.torch.itemsize


DTYPES = (
    Dtype(1, "F64", torch.float64),
    Dtype(2, "F32", torch.float32),
    Dtype(3, "F16", torch.float16),
    Dtype(4, "BF16", torch.bfloat16),
    Dtype(5, "F8_E4M3", torch.float8_e4m3fn),
    Dtype(6, "F8_E5M2", torch.float8_e5m2),
    Dtype(7, "I64", torch.int64),
    Dtype(8, "I32", torch.int32),
    Dtype(9, "I16", torch.int16),
    Dtype(10, "I8", torch.int8),
    Dtype(11, "U8", torch.uint8),
    Dtype(12, "BOOL", torch.bool),
)
BY_CODE = {dtype.code: dtype for dtype in DTYPES}
BY_TORCH = {dtype.torch: dtype for dtype in DTYPES}


@dataclass(frozen=True)
class FileRecord:
    """A weight file: `checksum` (CRC-32) covers its first `data_offset` bytes, the safetensors header."""

    name: str
    size: int
    data_offset: int
    checksum: int

    @property
    def part(self) -> str:
        return self.name.removesuffix(WEIGHTS_ENDING)


@dataclass(frozen=True)
class TensorRecord:
    """A tensor: `offset` from the first byte of its file; `scale` the number of the tensor with its scales, or None."""

    name: str
    file: int
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    size: int
    checksum: int
    scale: int | None = None

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Index:
    """Everything that `bundle.idx` says; files ascend by name, tensors by file and offset."""

    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]

    def find(self, name: str) -> TensorRecord:
        """The tensor of that name; KeyError when there is none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)


def index_size(files: int, tensors: int, strings: int) -> int:
    """Bytes of an index: header, file table, tensor table, numbers by name (padded to 8), strings."""
    return HEADER.size + FILE.size * files + TENSOR.size * tensors + _padded(4 * tensors) + strings


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def pack(index: Index) -> bytes:
    """The bytes of `bundle.idx`. Raises BundleError when the index breaks a rule."""
    strings = bytearray()

    def place(name: str) -> tuple[int, int]:
        at, raw = len(strings), name.encode("ascii", "replace")
        strings.extend(raw + b"\0")
        return at, len(raw)

    tables = bytearray()
    for file in index.files:
        tables += FILE.pack(*place(file.name), file.checksum, file.size, file.data_offset)
    for tensor in index.tensors:
        if len(tensor.shape) > MAX_RANK:
            raise BundleError(f"{tensor.name} has {len(tensor.shape)} dimensions; a bundle holds up to {MAX_RANK}")
        shape = (*tensor.shape, *(0,) * (MAX_RANK - len(tensor.shape)))
        scale = NO_SCALE if tensor.scale is None else tensor.scale
        where = tensor.file, tensor.dtype.code, len(tensor.shape), tensor.offset, tensor.size
        tables += TENSOR.pack(*place(tensor.name), *where, tensor.checksum, scale, 0, 0, *shape)
    order = sorted(range(len(index.tensors)), key=lambda i: index.tensors[i].name.encode("ascii", "replace"))
    tables += struct.pack(f"<{len(order)}I", *order).ljust(_padded(4 * len(order)), b"\0")
    counts = len(index.files), len(index.tensors)
    size = index_size(*counts, len(strings))
    fields = VERSION, size, 0, *counts, ALIGNMENT, PAGE, 0, len(strings), 0
    packed = sealed(HEADER.pack(MAGIC, ENDIAN_MARK, *fields) + tables + strings)
    parse(packed, "the new index")
    return packed


def sealed(index: bytes) -> bytes:
    """The same index with its checksum made right."""
    return index[: CHECKED_FROM - 4] + struct.pack("<I", zlib.crc32(index[CHECKED_FROM:])) + index[CHECKED_FROM:]


def parse(data: bytes, source: str) -> Index:
    """The index of its bytes; every rule is checked. Raises BundleError that names `source` and the rule broken."""

    def need(holds: bool, problem: str) -> None:
        if not holds:
            raise BundleError(f"{source}: {problem}")

    need(HEADER.size <= len(data) <= MAX_INDEX_BYTES, f"{len(data)} bytes cannot be an index")
    found = HEADER.unpack_from(data)
    magic, mark, version, size, checksum, file_count, tensor_count, alignment, page, zero, strings_size, zero2 = found
    need(magic == MAGIC, f"does not begin with {MAGIC.decode()}; this is no index of a bundle")
    need(mark == ENDIAN_MARK, "the mark of its byte order is wrong")
    need(version == VERSION, f"its version is {version}; this program reads version {VERSION}")
    need(size == len(data), f"it says {size} bytes and has {len(data)}; it was cut or grew")
    need(checksum == zlib.crc32(data[CHECKED_FROM:]), "its checksum does not fit; it was damaged")
    need((alignment, page, zero, zero2) == (ALIGNMENT, PAGE, 0, 0), "its alignments or reserved fields are wrong")
    need(1 <= file_count <= MAX_FILES, f"{file_count} files; there must be 1 to {MAX_FILES}")
    need(index_size(file_count, tensor_count, strings_size) == size, "its tables do not fill it")
    tensors_at = HEADER.size + FILE.size * file_count
    order_at = tensors_at + TENSOR.size * tensor_count
    strings = data[size - strings_size :]
    need(not any(data[order_at + 4 * tensor_count : size - strings_size]), "bytes between its tables are not zero")

    def name(what: str, at: int, length: int) -> str:
        need(1 <= length < strings_size and at <= strings_size - 1 - length, f"the name of {what} lies outside")
        raw = strings[at : at + length]
        need(strings[at + length] == 0, f"the name of {what} does not end with a zero byte")
        need(all(0x21 <= byte <= 0x7E for byte in raw), f"the name of {what} is not printable ASCII")
        return raw.decode("ascii")

    files: list[FileRecord] = []
    for i in range(file_count):
        at, length, crc, file_size, data_offset = FILE.unpack_from(data, HEADER.size + FILE.size * i)
        files.append(FileRecord(name(f"file {i}", at, length), file_size, data_offset, crc))
        _check_file(files, need)
    tensors: list[TensorRecord] = []
    for i in range(tensor_count):
        record = TENSOR.unpack_from(data, tensors_at + TENSOR.size * i)
        at, length, file, code, rank, offset, bytes_, crc, scale, zero, zero2, *shape = record
        label = name(f"tensor {i}", at, length)
        need(file < file_count, f"{label} lies in file {file} of {file_count}")
        need(code in BY_CODE, f"{label} has the unknown dtype {code}")
        need(rank <= MAX_RANK, f"{label} has {rank} dimensions")
        need(not any(shape[rank:]) and not zero and not zero2, f"{label} has reserved fields that are not zero")
        linked = None if scale == NO_SCALE else scale
        tensors.append(TensorRecord(label, file, BY_CODE[code], tuple(shape[:rank]), offset, bytes_, crc, linked))
        _check_place(tensors, files, need)
    for tensor in tensors:
        _check_scale(tensor, tensors, need)
    order = struct.unpack_from(f"<{tensor_count}I", data, order_at)
    need(all(number < tensor_count for number in order), "its order by name points outside")
    names = [tensors[number].name for number in order]
    need(all(a < b for a, b in pairwise(names)), "two tensors have one name, or the order is wrong")
    return Index(tuple(files), tuple(tensors))


Need = Callable[[bool, str], None]


def _check_file(files: Sequence[FileRecord], need: Need) -> None:
    file = files[-1]
    plain = file.name.endswith(WEIGHTS_ENDING) and file.part and not any(c in file.name for c in "/\\:")
    need(bool(plain) and not file.name.startswith("."), f"{file.name} is no plain name that ends with {WEIGHTS_ENDING}")
    need(len(files) < 2 or files[-2].name < file.name, f"{file.name} is out of order")
    need(file.data_offset > 8 and file.data_offset % PAGE == 0, f"the data of {file.name} do not begin on a page")
    need(file.data_offset <= file.size < 1 << 63, f"{file.name} has {file.size} bytes and data at {file.data_offset}")


def _check_place(tensors: Sequence[TensorRecord], files: Sequence[FileRecord], need: Need) -> None:
    tensor = tensors[-1]
    file = files[tensor.file]
    need(tensor.name.startswith(f"{file.part}."), f"{tensor.name} is not named after its file {file.name}")
    count = math.prod(tensor.shape)
    need(math.prod(max(side, 1) for side in tensor.shape) < 1 << 63, f"the shape of {tensor.name} is absurd")
    need(count * tensor.dtype.itemsize == tensor.size, f"{tensor.name} has {tensor.size} bytes, which is not its shape")
    step = PAGE if tensor.size >= PAGED else ALIGNMENT
    need(tensor.offset % step == 0, f"{tensor.name} at byte {tensor.offset} is not aligned to {step}")
    need(file.data_offset <= tensor.offset and tensor.end <= file.size, f"{tensor.name} lies outside of {file.name}")
    if len(tensors) > 1:
        before = tensors[-2]
        after = tensor.file > before.file or (tensor.file == before.file and tensor.offset >= before.end)
        need(after, f"{tensor.name} overlaps {before.name}, or is out of order")


def _check_scale(tensor: TensorRecord, tensors: Sequence[TensorRecord], need: Need) -> None:
    if tensor.scale is None:
        return
    need(tensor.scale < len(tensors), f"the scale of {tensor.name} points outside")
    scale = tensors[tensor.scale]
    fits = scale.dtype.name == "F32" and scale.scale is None and scale.file == tensor.file
    need(fits, f"{scale.name} cannot be a scale of {tensor.name}")
    need(
        bool(tensor.shape) and math.prod(scale.shape) in (1, tensor.shape[0]),
        f"{scale.name} has {math.prod(scale.shape)} scales, {tensor.name} needs 1 or one a row",
    )


def parse_file(path: Path) -> Index:
    """The index of a file, of which every rule is checked. Raises BundleError."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise BundleError(f"{path} is larger than any index")
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})") from error


def read_index(folder: Path) -> Index:
    """The index of a bundle, checked also against the sizes of its files. Raises BundleError."""
    index = parse_file(folder / INDEX_FILE)
    try:
        for file in index.files:
            size = (folder / file.name).stat().st_size
            if size != file.size:
                raise BundleError(f"{folder / file.name} has {size} bytes and should have {file.size}; copy it again")
            with open(folder / file.name, "rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
            if length + 8 != file.data_offset:
                raise BundleError(f"{folder / file.name} has a header of {length} bytes, not as its index says")
    except OSError as error:
        raise BundleError(f"{error.filename or folder} cannot be read ({error.strerror})") from error
    return index
