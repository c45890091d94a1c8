"""Writing a bundle: everything into a temporary folder beside the goal, which takes its name when it is complete."""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
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
from .layout import PART_KEY, SCALE_ENDING, Place, place_tensors, safetensors_header

HEADER_SOURCE = Path(__file__).parents[1] / "c" / "kinora_bundle.h"
FORMAT = "kinora-bundle"
PIECE = 1 << 24
AHEAD = 3  # tensors that are copied from their device while one is hashed, and as many that are written
WORKERS = 2 * AHEAD + 1  # one more for flushing
HASHERS = 8  # files
FLUSHED_AT_ONCE = 1 << 29  # bytes
WRITTEN_AT_ONCE = 1 << 30  # bytes of one call; macOS refuses 2 GiB


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
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        _replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise BundleError(f"{folder} could not be written ({error.strerror}); what was there before is kept") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """To the disk: what is renamed must not be empty after a power failure. Not all systems can do this of a folder."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        _flush(folder.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old)  # an empty folder is replaced
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_part(
    folder: Path, part: str, tensors: Mapping[str, Tensor], number: int, first: int
) -> tuple[FileRecord, list[TensorRecord], str]:
    """Write file `number`, whose first tensor is `first` of the bundle -> its records and its SHA-256.

    The SHA-256 of a file goes through its bytes one after the other, so that this thread does nothing else; meanwhile
    others copy the next tensors from their device, and write those before, with their CRC-32. Of AHEAD tensors each.
    """
    places = place_tensors(tensors)
    header = safetensors_header(places, {"format": "pt", PART_KEY: part})
    size = len(header) + (places[-1].end if places else 0)
    digest, end = hashlib.sha256(header), 0
    for device in {place.tensor.device for place in places if place.tensor.is_cuda}:
        torch.cuda.synchronize(device)  # the copies run on the streams of other threads
    with open(folder / f"{part}{WEIGHTS_ENDING}", "wb", buffering=0) as file, ThreadPoolExecutor(WORKERS) as pool:
        target = file.fileno()
        file.truncate(size)  # what is written nowhere is zero
        write_at(target, header, 0)

        def store(data: memoryview, offset: int) -> int:
            """-> CRC-32"""
            write_at(target, data, len(header) + offset)
            return zlib.crc32(data)

        stored: list[Future[int]] = []
        flushed, flushing = 0, pool.submit(os.fsync, target)
        for place, data in zip(places, _copied(places, pool), strict=True):
            if len(stored) >= AHEAD:
                stored[-AHEAD].result()
            stored.append(pool.submit(store, data, place.offset))
            digest.update(bytes(place.offset - end))
            digest.update(data)
            end = place.end
            if end - flushed >= FLUSHED_AT_ONCE and flushing.done():  # the disk works too, from the beginning
                flushing.result()
                flushed, flushing = end, pool.submit(os.fsync, target)
        crcs = [each.result() for each in stored]
        flushing.result()
        os.fsync(target)
    numbers = {place.key: first + i for i, place in enumerate(places)}
    records = [
        TensorRecord(
            f"{part}.{place.key}",
            number,
            BY_TORCH[place.tensor.dtype],
            tuple(place.tensor.shape),
            len(header) + place.offset,
            place.tensor.nbytes,
            crc,
            numbers.get(f"{place.key}{SCALE_ENDING}"),
        )
        for place, crc in zip(places, crcs, strict=True)
    ]
    return FileRecord(f"{part}{WEIGHTS_ENDING}", size, len(header), zlib.crc32(header)), records, digest.hexdigest()


def _copied(places: Sequence[Place], pool: ThreadPoolExecutor) -> Iterator[memoryview]:
    """The bytes of each tensor, while those of the next AHEAD are on their way."""
    coming: deque[Future[memoryview]] = deque()
    for place in places:
        coming.append(pool.submit(tensor_bytes, place.tensor))
        if len(coming) > AHEAD:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset` of a file. Raises OSError."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest[:WRITTEN_AT_ONCE], offset)
        rest, offset = rest[count:], offset + count


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on any device, row-major."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def file_hashes(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of files, in hexadecimal; several at once, because a file's is the work of one core."""
    with ThreadPoolExecutor(HASHERS) as pool:
        return list(pool.map(file_sha256, paths))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
