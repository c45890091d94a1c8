"""A bundle's weights onto a GPU: threads read pieces of the file into pinned memory while earlier ones are copied on.

Nothing is converted: bytes of the file are bytes of the tensor. Each tensor owns its memory, so that a compiler may
free it on its own.
"""

import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .format import BundleError, TensorRecord
from .read import Bundle

PIECE = 32 << 20  # bytes that are read and copied at once
READERS = 6


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of the file, and the tensors that have some of them."""

    start: int
    end: int
    records: tuple[tuple[str, TensorRecord], ...]


def cut(records: Sequence[tuple[str, TensorRecord]], piece: int = PIECE) -> list[Piece]:
    """The bytes of tensors that follow one another in a file as pieces of at most `piece` bytes."""
    found: list[Piece] = []
    first = 0
    while first < len(records):
        start = records[first][1].offset
        last = first
        while last + 1 < len(records) and records[last + 1][1].end - start <= piece:
            last += 1
        end = records[last][1].end
        held = tuple(records[first : last + 1])
        found += [Piece(at, min(at + piece, end), held) for at in range(start, max(end, start + 1), piece)]
        first = last + 1
    return found


def read_to_device(bundle: Bundle, part: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a part by key: on the CPU mapped, on a GPU copied there. Raises BundleError when a read fails."""
    if device.type != "cuda":
        return {key: value.to(device) for key, value in bundle.mapped(part).items()}
    records = bundle.records(part)
    made = {key: torch.empty(r.shape, dtype=r.dtype.torch, device=device) for key, r in records.items()}
    targets = {key: value.reshape(-1).view(torch.uint8) for key, value in made.items() if value.numel()}
    path = bundle.folder / bundle.index.files[bundle.parts.index(part)].name
    _copy(path, cut(list(records.items())), targets, device)
    return made


def _copy(path: Path, pieces: list[Piece], targets: dict[str, Tensor], device: torch.device) -> None:
    """Fill `targets` (bytes by key, on `device`) from the pieces of a file."""
    work: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    for piece in pieces:
        work.put(piece)
    largest = max((piece.end - piece.start for piece in pieces), default=0)
    torch.cuda.current_stream(device).synchronize()  # the allocator may hand out memory that is still being read
    failed = threading.Event()

    def run() -> None:
        stream = torch.cuda.Stream(device)
        buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event() for _ in buffers]
        with open(path, "rb", buffering=0) as file, torch.cuda.stream(stream):
            for turn in range(len(pieces)):
                try:
                    piece = work.get_nowait()
                except queue.Empty:
                    break
                if failed.is_set():
                    break
                copied[turn % 2].synchronize()  # at once, before the buffer's first copy
                fill(file.fileno(), buffers[turn % 2], piece, path)
                scatter(buffers[turn % 2], piece, targets)
                copied[turn % 2].record(stream)
        stream.synchronize()

    def run_or_stop_all() -> None:
        try:
            run()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(READERS, len(pieces) or 1)) as pool:
        for reader in [pool.submit(run_or_stop_all) for _ in range(READERS)]:
            reader.result()


def fill(descriptor: int, buffer: Tensor, piece: Piece, path: Path) -> None:
    """Read a piece of a file into the beginning of `buffer`. Raises BundleError when the file ends before it does."""
    target, done = buffer.numpy().data[: piece.end - piece.start], 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], piece.start + done)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror})") from error
        if not count:
            raise BundleError(f"{path} ends at byte {piece.start + done}; copy the bundle again")
        done += count


def scatter(buffer: Tensor, piece: Piece, targets: dict[str, Tensor]) -> None:
    """Copy a piece in `buffer` to the tensors that have some of its bytes."""
    for key, record in piece.records:
        start, end = max(piece.start, record.offset), min(piece.end, record.end)
        if start < end:
            target = targets[key][start - record.offset : end - record.offset]
            target.copy_(buffer[start - piece.start : end - piece.start], non_blocking=True)
