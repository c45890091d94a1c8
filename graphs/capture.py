"""CUDA graphs: a function over static buffers, recorded once and replayed without Python, allocation or host reads."""

import warnings
from collections.abc import Callable

import torch

WARM_UP = 2  # calls before recording: kernels are compiled, libraries choose their algorithms


def record(function: Callable[[], object], device: torch.device, warm_up: int = WARM_UP) -> torch.cuda.CUDAGraph:
    """Call `function` `warm_up` times on a stream of its own, then record one more call of it."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


class Replay:
    """Calls `function()`, which reads and writes static tensors only; on a GPU records it at the first call.

    The function must do the same launches every time, and must not change what it reads other than idempotently: it
    runs `WARM_UP` times before it is recorded. Where recording is impossible (no GPU, or an operation that a graph
    cannot hold) every call runs the function; a warning then says why.
    """

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.function = function
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured = device.type == "cuda"

    def __call__(self) -> None:
        if self.captured and self.graph is None:
            self._record()
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()

    def _record(self) -> None:
        try:
            self.graph = record(self.function, self.device)
        except RuntimeError as error:
            self.captured = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"this block cannot be captured as a CUDA graph and runs launch by launch: {reason}", stacklevel=3
            )
