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

from .graph_nodes import Nodes
from .join_clears import Counters, join_clears

RECORDING = threading.RLock()
"""PyTorch traces and records one thing at a time in a process: held by whoever does."""
JOIN_CLEARS = True
"""Off, library kernels keep the memset before each of them: for measuring what that costs."""
WARM_UP = 2  # calls before recording: kernels are compiled, libraries choose their algorithms


@dataclass(frozen=True)
class Recording:
    """A recorded graph, and what has to stay as long as it is replayed."""

    graph: torch.cuda.CUDAGraph
    counters: Counters | None = None

    def replay(self) -> None:
        self.graph.replay()


@dataclass(frozen=True)
class Pool:
    """Working memory that graphs share. PyTorch takes a pool back with its last graph; `anchor` is one that stays."""

    handle: Any  # opaque
    anchor: Recording
    static: Tensor  # what the anchor writes


def shared_pool(device: torch.device) -> Pool | None:
    """Working memory for several graphs on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    handle, static = torch.cuda.graph_pool_handle(), torch.zeros(1, device=device)
    return Pool(handle, _record(static.zero_, device, WARM_UP, handle, False), static)


def record(
    function: Callable[[], object],
    device: torch.device,
    warm_up: int = WARM_UP,
    pool: Pool | None = None,
    repeatable: bool = False,
) -> Recording:
    """Call `function` `warm_up` times on a stream of its own, then record one more call of it.

    `pool`: where the working memory comes from, None for a pool of its own. `repeatable`: one more call changes
    nothing; the counters of library kernels are then joined (`join_clears`), and a replay shows that this works.
    """
    return _record(function, device, warm_up, None if pool is None else pool.handle, repeatable)


def _record(
    function: Callable[[], object], device: torch.device, warm_up: int, handle: Any, repeatable: bool
) -> Recording:
    with RECORDING, torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                function()
        torch.cuda.current_stream(device).wait_stream(side)
        if repeatable and JOIN_CLEARS:
            recording = _joined(_captured(function, handle, keep_graph=True), device)
            if recording is not None:
                return recording
        return Recording(_captured(function, handle))


def _captured(function: Callable[[], object], handle: Any, keep_graph: bool = False) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph)
    with torch.cuda.graph(graph, pool=handle, capture_error_mode="thread_local"):  # other threads may go on
        function()
    return graph


def _joined(graph: torch.cuda.CUDAGraph, device: torch.device) -> Recording | None:
    """The graph with its counters joined; None where the driver is too old or refuses, or a kernel left its counter."""
    try:
        counters = join_clears(Nodes(graph.raw_cuda_graph()), device)
        graph.instantiate()
        if counters is not None:
            graph.replay()
    except (AttributeError, OSError, RuntimeError) as error:
        warnings.warn(f"the counters of library kernels are cleared one by one: {error}", stacklevel=4)
        return None
    if counters is None or counters.kept():
        return Recording(graph, counters)
    warnings.warn("a library kernel uses more than its counter: counters are cleared one by one", stacklevel=4)
    return None


class Replay:
    """Calls `method()`, which reads and writes static tensors only; on a GPU records it at the first call.

    `method` is bound to the object that owns this replay, which does not keep it alive: without a cycle of references
    its buffers are freed with the last one. It must do the same launches every time, and must not change what it reads
    other than idempotently: it runs `WARM_UP` times before it is recorded, and once after. Where recording is
    impossible (no GPU, or an operation that a graph cannot hold) every call runs it; a warning then says why.
    """

    def __init__(self, method: Callable[[], None], device: torch.device, pool: Pool | None = None):
        self.method = weakref.WeakMethod(method)
        self.device = device
        self.pool = pool
        self.graph: Recording | None = None
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
            self.graph = record(self._function, self.device, pool=self.pool, repeatable=True)
        except torch.OutOfMemoryError:
            raise  # the function itself would not fit either
        except RuntimeError as error:
            self.captured = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"this function cannot be recorded as a CUDA graph and runs launch by launch, more slowly: {reason}",
                stacklevel=3,
            )
