"""Reading a bundle: its manifest, and its tensors where they lie in the page cache."""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .format import INDEX_FILE, MANIFEST_FILE, VERSION, BundleError, FileRecord, Index, TensorRecord, read_index
from .write import FORMAT


def is_bundle(folder: Path) -> bool:
    """Whether the folder holds an index and a manifest; neither is read."""
    return (folder / INDEX_FILE).is_file() and (folder / MANIFEST_FILE).is_file()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; `open` checks all of its index."""

    folder: Path
    index: Index
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Read index and manifest of a folder. Raises BundleError, which names the file, and nothing else."""
        folder = Path(folder)
        return cls(folder, read_index(folder), _read_manifest(folder / MANIFEST_FILE))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the weight files, less their ending."""
        return tuple(file.part for file in self.index.files)

    def records(self, part: str) -> dict[str, TensorRecord]:
        """Key in the file -> record, in execution order. KeyError for a part that the bundle lacks."""
        number = self.parts.index(part) if part in self.parts else -1
        if number < 0:
            raise KeyError(f"{self.folder} has no part {part!r}; it has {', '.join(self.parts)}")
        return {t.name.removeprefix(f"{part}."): t for t in self.index.tensors if t.file == number}

    def mapped(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part on the CPU, mapped: pages are read when they are touched, and writing copies a page."""
        records = self.records(part)
        data = map_file(self.folder, self.index.files[self.parts.index(part)])
        return {key: view(data, record) for key, record in records.items()}


def map_file(folder: Path, file: FileRecord) -> Tensor:
    """All bytes of a weight file, uint8 [size], copied on write. Raises BundleError when it was cut."""
    path = folder / file.name
    try:
        with open(path, "rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be mapped ({error})") from error
    if len(mapped) != file.size:
        raise BundleError(f"{path} has {len(mapped)} bytes and should have {file.size}; copy it again")
    return torch.frombuffer(mapped, dtype=torch.uint8)


def view(data: Tensor, record: TensorRecord) -> Tensor:
    """The tensor of a record in the bytes of its file."""
    if not math.prod(record.shape):
        return torch.empty(record.shape, dtype=record.dtype.torch)
    return data[record.offset : record.end].view(record.dtype.torch).view(record.shape)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path} is no manifest of a bundle: its format must be {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise BundleError(f"{path} has version {manifest.get('version')!r}; this program reads version {VERSION}")
    return manifest
