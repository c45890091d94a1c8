"""A training step as one CUDA graph: forward, backward and optimiser in one launch, without Python in between."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..graphs.capture import Recording, record

Step = Callable[..., tuple[Tensor, ...]]


class CapturedStep:
    """Calls `step(*inputs)`; on a GPU records it at the first call and replays it afterwards.

    `step` must take tensors of the same shapes every time, must not read values on the host, and may change parameters
    and optimiser state in place. Its first call runs it `warmup` times for real (libraries choose their algorithms,
    optimisers make their state) before recording. The returned tensors are overwritten by the next call: copy what you
    keep. On a CPU it is a plain call.
    """

    def __init__(self, step: Step, device: torch.device, warmup: int = 3):
        self.step, self.device, self.warmup = step, device, warmup
        self.graph: Recording | None = None
        self.inputs: list[Tensor] = []
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.device.type != "cuda":
            return self.step(*inputs)
        if self.graph is None:
            self._record(inputs)
        assert self.graph is not None
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [value.clone() for value in inputs]  # keeps the memory format
        self.graph = record(self._run, self.device, self.warmup)

    def _run(self) -> None:
        self.outputs = self.step(*self.inputs)
