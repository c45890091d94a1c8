"""Tensors of weight files on their way to a device, one at a time, in the order in which they lie on the disk.

To a GPU: several threads read pieces into pinned buffers, a side stream copies each piece as soon as it is there, and
two staging areas on the device take turns, so that reading, copying and the caller's own work on the tensor before
overlap. The host holds the pinned buffers and nothing else, the device two of the largest tensors.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .sources import Weights

PIECE = 32 * 2**20  # bytes of a pinned buffer
READERS = 8
BUFFERS = 2  # of each reader: one being filled, one being copied


def stream_tensors(
    weights: Weights, names: Sequence[str], device: torch.device, readers: int = READERS
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) for each of `names`.

    A tensor is valid until the next one is asked for; clone what is to be kept. Use it on the current CUDA stream.
    """
    if device.type == "cuda":
        yield from _to_gpu(weights, names, device, readers)
        return
    for name in names:
        yield name, weights.read(name).to(device)


@dataclass(frozen=True)
class _Piece:
    """Bytes [start, start + size) of a tensor."""

    name: str
    start: int
    size: int
    last: bool


def _pieces(weights: Weights, names: Sequence[str], largest: int) -> Iterator[_Piece]:
    for name in names:
        size = weights[name].nbytes
        for start in range(0, max(size, 1), largest):  # an empty tensor is one empty piece
            end = min(start + largest, size)
            yield _Piece(name, start, end - start, end == size)


class _Buffer:
    """A pinned buffer and the event after which its last copy is done."""

    def __init__(self) -> None:
        self.bytes = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()

    def fill(self, weights: Weights, piece: _Piece) -> None:
        """Read a piece, once the copy before is done; runs in a reader thread."""
        self.copied.synchronize()
        weights.read_into(piece.name, piece.start, self.bytes[: piece.size])


class _Staging:
    """Room for one tensor on the device."""

    def __init__(self, size: int, device: torch.device):
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.filled, self.used = torch.cuda.Event(), torch.cuda.Event()


def _to_gpu(weights: Weights, names: Sequence[str], device: torch.device, readers: int) -> Iterator[tuple[str, Tensor]]:
    if not names:
        return
    with torch.cuda.device(device):
        copies, largest = torch.cuda.Stream(), max(weights[name].nbytes for name in names)
        stages = [_Staging(largest, device) for _ in range(2)]
        copies.wait_stream(torch.cuda.current_stream())  # the staging memory may have been in use until now
    free = deque(_Buffer() for _ in range(BUFFERS * readers))
    coming = _pieces(weights, names, PIECE)
    ready: deque[tuple[_Piece, _Buffer, Future[None]]] = deque()

    with ThreadPoolExecutor(readers, "kinora-read") as pool:

        def ask() -> None:
            """Keep every free buffer busy."""
            while free and (piece := next(coming, None)) is not None:
                buffer = free.popleft()
                ready.append((piece, buffer, pool.submit(buffer.fill, weights, piece)))

        try:
            for place, name in enumerate(names):
                stage, entry = stages[place % 2], weights[name]
                copies.wait_event(stage.used)
                done = False
                while not done:
                    ask()
                    piece, buffer, filled = ready.popleft()
                    filled.result()
                    with torch.cuda.stream(copies):
                        target = stage.bytes[piece.start : piece.start + piece.size]
                        target.copy_(buffer.bytes[: piece.size], non_blocking=True)
                        buffer.copied.record(copies)
                    free.append(buffer)
                    done = piece.last
                stage.filled.record(copies)
                current = torch.cuda.current_stream(device)
                current.wait_event(stage.filled)
                yield name, stage.bytes[: entry.nbytes].view(entry.dtype).view(entry.shape)
                stage.used.record(current)
        finally:
            for _, _, filled in ready:
                filled.cancel()
            torch.cuda.current_stream(device).wait_stream(copies)  # the staging memory goes back to this stream
            copies.synchronize()  # and the buffers are not freed under a copy
