"""CUDA graphs: a function over static buffers, recorded once and replayed without Python, allocation or host reads.

Graphs may share one pool of working memory (`shared_pool`) when they are replayed one after another on one stream and
keep nothing in it between replays: results belong in buffers that were allocated outside.
"""

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RECORDING = threading.RLock()
"""PyTorch traces and records one thing at a time in a process: held by whoever does."""
WARM_UP = 2  # calls before recording: kernels are compiled, libraries choose their algorithms


@dataclass(frozen=True)
class Pool:
    """Working memory that graphs share. PyTorch takes a pool back with its last graph; `anchor` is one that stays."""

    handle: Any  # opaque
    anchor: torch.cuda.CUDAGraph
    static: Tensor  # what the anchor writes


def shared_pool(device: torch.device) -> Pool | None:
    """Working memory for several graphs on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    handle, static = torch.cuda.graph_pool_handle(), torch.zeros(1, device=device)
    return Pool(handle, _record(static.zero_, device, WARM_UP, handle), static)


def record(
    function: Callable[[], object], device: torch.device, warm_up: int = WARM_UP, pool: Pool | None = None
) -> torch.cuda.CUDAGraph:
    """Call `function` `warm_up` times on a stream of its own, then record one more call of it.

    `pool`: where the working memory comes from, None for a pool of its own.
    """
    return _record(function, device, warm_up, None if pool is None else pool.handle)


def _record(function: Callable[[], object], device: torch.device, warm_up: int, handle: Any) -> torch.cuda.CUDAGraph:
    with RECORDING, torch.cuda.device(device):
        return _record_here(function, device, warm_up, handle)


def _record_here(
    function: Callable[[], object], device: torch.device, warm_up: int, handle: Any
) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=handle, capture_error_mode="thread_local"):  # other threads may go on
        function()
    return graph


class Replay:
    """Calls `method()`, which reads and writes static tensors only; on a GPU records it at the first call.

    `method` is bound to the object that owns this replay, which does not keep it alive: without a cycle of references
    its buffers are freed with the last one. It must do the same launches every time, and must not change what it reads
    other than idempotently: it runs `WARM_UP` times before it is recorded. Where recording is impossible (no GPU, or an
    operation that a graph cannot hold) every call runs it; a warning then says why.
    """

    def __init__(self, method: Callable[[], None], device: torch.device, pool: Pool | None = None):
        self.method = weakref.WeakMethod(method)
        self.device = device
        self.pool = pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured = device.type == "cuda"

    def __call__(self) -> None:
        self.record()
        if self.graph is None:
            self._function()
        else:
            self.graph.replay()

    def _function(self) -> None:
        method = self.method()
        assert method is not None, "the owner of this replay is gone"
        method()

    def record(self) -> None:
        """Record now, if that is possible here and was not done."""
        if not self.captured or self.graph is not None:
            return
        try:
            self.graph = record(self._function, self.device, pool=self.pool)
        except torch.OutOfMemoryError:
            raise  # the function itself would not fit either
        except RuntimeError as error:
            self.captured = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"this function cannot be recorded as a CUDA graph and runs launch by launch, more slowly: {reason}",
                stacklevel=3,
            )
