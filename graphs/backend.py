"""`torch.compile(model, backend="kinora")`: the compiler's passes for modules that are not ours.

The graph that PyTorch captured is traced to ATen, its plain patterns are lifted to the ops of `kernels/`, and those are
concatenated and fused. What is left runs in inductor on a GPU and call by call on a CPU. For inference: where gradients
are wanted, or shapes are symbolic, the captured graph runs as it is and a warning says so.

An installed Kinora is found by the name alone (entry point `torch_dynamo_backends`); otherwise import this file.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import list_backends, register_backend

from .rewrite.passes import clean, lift
from .rewrite.program import Argument, Program, trace
from .rewrite.recipe import Recipe, apply

NAME = "kinora"
RECIPE = Recipe(fold=False, emit=False)
"""Nothing is folded: weights of a module that is not ours may change between calls."""


def kinora(graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """The backend: a captured graph and its inputs -> the function that runs it."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return _as_it_is(graph, "its result needs gradients and this backend is for inference; use torch.no_grad()")
    if not all(isinstance(t, Tensor) for t in inputs):
        return _as_it_is(graph, "its shapes are symbolic; pass dynamic=False to torch.compile")
    return CompiledGraph(graph, inputs)


def _as_it_is(graph: fx.GraphModule, reason: str) -> Callable[..., Any]:
    warnings.warn(f"backend {NAME!r} leaves a graph as it is: {reason}", stacklevel=3)
    return graph.forward


class CompiledGraph:
    """A rewritten graph that takes the inputs of the captured one; `program` holds it with its reports.

    Parameters are constants of the program, joined ones are copies; the program is made anew when one of them is
    another tensor than before, or was written to.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]):
        self.graph = graph
        self.constant = [isinstance(t, nn.Parameter) for t in inputs]
        self._build(inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        weights, moving = self._split(inputs)
        if any(t is not old or _version(t) != v for t, (old, v) in zip(weights, self.weights, strict=True)):
            self._build(inputs)
        with torch.no_grad():
            return self.run(*moving)

    def _split(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        weights = [t for t, constant in zip(inputs, self.constant, strict=True) if constant]
        moving = [t for t, constant in zip(inputs, self.constant, strict=True) if not constant]
        return weights, moving

    def _build(self, inputs: Sequence[Tensor]) -> None:
        weights, moving = self._split(inputs)
        self.weights = [(t, _version(t)) for t in weights]
        self.program = self._rewritten(weights, moving)
        self.run: Callable[..., Any] = self.program.module
        if inductor_runs(inputs):
            self.run = through_inductor(self.program, moving)

    def _rewritten(self, weights: Sequence[Tensor], moving: Sequence[Tensor]) -> Program:
        def captured(inputs: Sequence[Tensor]) -> Any:
            constants, others = iter(weights), iter(inputs)
            return self.graph(*(next(constants) if constant else next(others) for constant in self.constant))

        with torch._guards.tracing(None):  # else the tracer would join the capture that called us
            program = trace(captured, {"inputs": Argument(list(moving), "step")}, self.graph)
        program.reports += [clean(program), lift(program)]
        return apply(program, RECIPE)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def inductor_runs(inputs: Sequence[Tensor]) -> bool:
    """Whether the rest is worth inductor's time: on a GPU, where every launch saved counts."""
    return any(t.is_cuda for t in inputs)


def through_inductor(program: Program, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The rewritten graph with everything but the ops of `kernels/` compiled by PyTorch's inductor."""
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad():
        compiled: Any = compile_fx(program.module, list(inputs))
    return compiled


if NAME not in list_backends(exclude_tags=()):
    register_backend(kinora, name=NAME)
