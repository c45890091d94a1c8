"""The header of a safetensors file, checked against the file: every tensor's dtype, shape and place.

Layout (huggingface/safetensors, README "Format"): 8 bytes N, little endian; N bytes of JSON; the tensors' bytes. The
JSON maps a name to `dtype`, `shape` and `data_offsets` [begin, end) counted from the end of the header; `__metadata__`
maps strings to strings.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA = "__metadata__"
LARGEST_HEADER = 100_000_000  # the format's own limit


class UnreadableFile(ValueError):
    """A weight file that is missing, damaged, or holds something else than tensors."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. `offset`: bytes from the start of the file, None where the file has no plain place for it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself under `__metadata__`; empty where it says nothing. Raises UnreadableFile."""
    table, _, _ = _read_table(path)
    said = table.get(METADATA)
    return {key: value for key, value in said.items() if isinstance(value, str)} if isinstance(said, dict) else {}


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> entry, in the order of the header. Reads no tensor.

    Raises UnreadableFile with what was expected: a header longer than the file, offsets outside it, bytes that are
    missing at its end or belong to no tensor.
    """
    table, data, size = _read_table(path)
    try:
        items = [(name, value) for name, value in table.items() if name != METADATA]
        entries = {name: _entry(path, name, value, data) for name, value in items}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UnreadableFile):
            raise
        raise _no_table(path, error) from error
    _check_places(path, entries, data, size)
    return entries


def _read_table(path: Path) -> tuple[dict[str, Any], int, int]:
    """(JSON of the header, byte at which the data begin, bytes of the file)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _damaged(path, f"it has {size} bytes; a safetensors file begins with 8 bytes of header length")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, LARGEST_HEADER):
            raise _damaged(path, f"its header is said to be {length:,} bytes long, the file has {size:,}")
        text = file.read(length)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_table(path, error) from error
    if not isinstance(table, dict):
        raise _no_table(path, TypeError(f"it is a {type(table).__name__}"))
    return table, 8 + length, size


def _no_table(path: Path, error: Exception) -> UnreadableFile:
    return _damaged(path, f"its header is no table of tensors ({type(error).__name__}: {error})")


def _damaged(path: Path, what: str) -> UnreadableFile:
    return UnreadableFile(f"{path} is damaged: {what}; download it again")


def _entry(path: Path, name: str, value: dict[str, Any], data: int) -> Entry:
    if value["dtype"] not in DTYPES:
        raise UnreadableFile(f"{path}: {name} has the dtype {value['dtype']}; known are {', '.join(DTYPES)}")
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if any(type(number) is not int for number in (*shape, begin, end)):
        raise _damaged(path, f"{name} has the shape {shape} and lies at {begin} to {end}, expected whole numbers")
    if math.prod(max(side, 1) for side in shape) >= 1 << 63:
        raise _damaged(path, f"the shape {shape} of {name} is absurd")
    entry = Entry(path, DTYPES[value["dtype"]], shape, data + begin)
    if begin < 0 or any(side < 0 for side in entry.shape) or end - begin != entry.nbytes:
        wanted = f"{value['dtype']} {list(entry.shape)} takes {entry.nbytes:,} bytes"
        raise _damaged(path, f"{name} lies at {begin:,} to {end:,}, but {wanted}")
    return entry


def _check_places(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """The tensors fill the rest of the file, one after the other."""
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            raise _damaged(path, f"{name} begins at byte {entry.offset:,}, where {at:,} was expected")
        at += entry.nbytes
    if at != size:
        short = (
            f"{at - size:,} bytes are missing at its end" if at > size else f"{size - at:,} bytes belong to no tensor"
        )
        raise _damaged(path, f"its header promises {at:,} bytes, the file has {size:,}: {short}")
