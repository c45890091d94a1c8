"""Writing a bundle: everything into a temporary folder beside the goal, which takes its name when it is complete."""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .format import (
    BY_TORCH,
    INDEX_FILE,
    MANIFEST_FILE,
    WEIGHTS_ENDING,
    BundleError,
    FileRecord,
    Index,
    TensorRecord,
    pack,
)
from .layout import PART_KEY, SCALE_ENDING, place_tensors, safetensors_header

HEADER_SOURCE = Path(__file__).parents[1] / "c" / "kinora_bundle.h"
FORMAT = "kinora-bundle"
PIECE = 1 << 24


def write_bundle(
    folder: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    manifest: Mapping[str, Any],
    *,
    copies: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the bundle `folder`, whole or not at all.

    `parts`: part -> key -> tensor on any device, in execution order; each becomes `<part>.safetensors`. `manifest`:
    what the manifest says beside format and hashes. `copies`: further files by their path in the bundle.
    Raises BundleError when the folder exists, names or dtypes do not fit, or the disk is full.
    """
    folder = Path(folder)
    check_goal(folder, overwrite)
    copies = {HEADER_SOURCE.name: HEADER_SOURCE, **(copies or {})}
    needed = sum(t.nbytes for part in parts.values() for t in part.values())
    needed += sum(path.stat().st_size for path in copies.values())
    with _folder(folder, needed) as partial:
        files: list[FileRecord] = []
        tensors: list[TensorRecord] = []
        hashes: dict[str, dict[str, object]] = {}
        for part in sorted(parts, key=lambda part: part + WEIGHTS_ENDING):
            file, found, digest = _write_part(partial, part, parts[part], len(files), len(tensors))
            files.append(file)
            tensors += found
            hashes[file.name] = {"size": file.size, "sha256": digest}
        (partial / INDEX_FILE).write_bytes(pack(Index(tuple(files), tuple(tensors))))
        for name, source in copies.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
        for name in (INDEX_FILE, *copies):
            hashes[name] = {"size": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)}
        complete = {"format": FORMAT, "version": 1, **manifest, "files": hashes}
        (partial / MANIFEST_FILE).write_text(json.dumps(complete, indent=1) + "\n")
    return folder


def check_goal(folder: Path, overwrite: bool) -> None:
    """BundleError when a bundle may not be written to `folder`, which is worth knowing before a model is loaded."""
    if folder.exists() and not overwrite:
        raise BundleError(f"{folder} exists; choose another name, or pass --overwrite (overwrite=True)")
    if folder.exists() and not ((folder / INDEX_FILE).is_file() or (folder.is_dir() and not any(folder.iterdir()))):
        raise BundleError(f"{folder} exists and is no bundle; it is not overwritten")


@contextmanager
def _folder(folder: Path, needed: int) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends, and is removed when it fails in any way."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise BundleError(f"{folder.parent} has {free / 1e9:.1f} GB free; the bundle needs {needed / 1e9:.1f}")
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise BundleError(f"{folder} cannot be written ({error.strerror}); choose another place") from error
    try:
        yield partial
        partial.chmod(0o755)
        _replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise BundleError(f"{folder} could not be written ({error.strerror}); what was there before is kept") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old)  # an empty folder is replaced
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_part(
    folder: Path, part: str, tensors: Mapping[str, Tensor], number: int, first: int
) -> tuple[FileRecord, list[TensorRecord], str]:
    """Write file `number`, whose first tensor is `first` of the bundle -> its records and its SHA-256."""
    places = place_tensors(tensors)
    header = safetensors_header(places, {"format": "pt", PART_KEY: part})
    numbers = {place.key: first + i for i, place in enumerate(places)}
    records: list[TensorRecord] = []
    digest, end = hashlib.sha256(), 0
    with open(folder / f"{part}{WEIGHTS_ENDING}", "wb") as file, ThreadPoolExecutor(2) as pool:

        def write(data: bytes | memoryview) -> int:
            """Write and hash at once -> CRC-32; each of the three lets the others run."""
            others: list[Future[Any]] = [pool.submit(digest.update, data), pool.submit(file.write, data)]
            crc = zlib.crc32(data)
            for other in others:
                other.result()
            return crc

        header_crc = write(header)
        for place in places:
            if place.offset > end:
                write(bytes(place.offset - end))
            crc = write(tensor_bytes(place.tensor))
            end = place.end
            dtype, shape = BY_TORCH[place.tensor.dtype], tuple(place.tensor.shape)
            where = len(header) + place.offset, place.tensor.nbytes
            scale = numbers.get(f"{place.key}{SCALE_ENDING}")
            records.append(TensorRecord(f"{part}.{place.key}", number, dtype, shape, *where, crc, scale))
        file.flush()
        os.fsync(file.fileno())
    record = FileRecord(f"{part}{WEIGHTS_ENDING}", len(header) + end, len(header), header_crc)
    return record, records, digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on any device, row-major."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
