"""`torch.compile(model, backend="kinora")`: the compiler's passes for modules that are not ours.

The graph that PyTorch captured is traced to ATen, its plain patterns are lifted to the ops of `kernels/`, and those are
concatenated and fused. What is left runs in inductor on a GPU and call by call on a CPU. For inference: where gradients
are wanted, shapes are symbolic, or the graph does what a trace does not keep (autocast regions of its own,
`torch.vmap`, `torch.cond`, checkpoints, writing a parameter), the captured graph runs as it is and a warning says so.

An installed Kinora is found by the name alone (entry point `torch_dynamo_backends`); otherwise import this file.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import list_backends, register_backend
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .rewrite.nodes import changing, weight_node
from .rewrite.passes import clean, lift
from .rewrite.program import Argument, Program, constant, trace
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
    try:
        return CompiledGraph(graph, inputs)
    except NotTraceable as error:
        return _as_it_is(graph, str(error))


class NotTraceable(ValueError):
    """A trace would not do what the captured graph does."""


def _as_it_is(graph: fx.GraphModule, reason: str) -> Callable[..., Any]:
    warnings.warn(f"backend {NAME!r} leaves a graph as it is: {reason}", stacklevel=3)
    return graph.forward


class CompiledGraph:
    """A rewritten graph that takes the inputs of the captured one; `program` holds it with its reports.

    Parameters are constants of the program, joined ones are copies; the program is made anew when one of them is
    another tensor than before, has other memory, or was written to. What PyTorch does not count is not seen: writing
    through `.data`, or to parameters made under `torch.inference_mode()`.
    NotTraceable where the graph has to run as it is.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]):
        _check_traceable(graph)
        self.graph = graph
        self.constant = [isinstance(t, nn.Parameter) for t in inputs]
        self._build(inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        weights, moving = self._split(inputs)
        if any(t is not old or _state(t) != state for t, (old, state) in zip(weights, self.weights, strict=True)):
            self._build(inputs)
        with torch.no_grad():
            return self.run(*moving)

    def _split(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        weights = [t for t, constant in zip(inputs, self.constant, strict=True) if constant]
        moving = [t for t, constant in zip(inputs, self.constant, strict=True) if not constant]
        return weights, moving

    def _build(self, inputs: Sequence[Tensor]) -> None:
        weights, moving = self._split(inputs)
        self.weights = [(t, _state(t)) for t in weights]
        self.program = self._rewritten(weights, moving)
        self.run: Callable[..., Any] = self.program.module
        if inductor_runs(inputs):
            self.run = through_inductor(self.program, moving)

    def _rewritten(self, weights: Sequence[Tensor], moving: Sequence[Tensor]) -> Program:
        def captured(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
            constants, others = iter(map(_traced, own, weights)), iter(inputs)
            return self.graph(*(next(constants) if constant else next(others) for constant in self.constant))

        own = weights
        # weights too are arguments, which are fake while tracing: a call that writes to one would write to a constant
        arguments = {"weights": Argument(list(weights), "model"), "inputs": Argument(list(moving), "step")}
        try:
            with torch._guards.tracing(None):  # else the tracer would join the capture that called us
                program = trace(captured, arguments, self.graph)
        except Exception as error:  # whatever a user's graph holds that the tracer does not take
            raise NotTraceable(f"tracing it failed ({type(error).__name__}: {error})") from error
        if any(isinstance(constant(program.module, n), FakeTensor) for n in program.graph.find_nodes(op="get_attr")):
            raise NotTraceable("its trace holds tensors without values")
        _bind(program, weights)
        program.reports += [clean(program), lift(program)]
        return apply(program, RECIPE)


def _traced(weight: Tensor, fake: Tensor) -> Tensor:
    """What stands for a parameter while tracing; the tensors that a subclass wraps become constants one by one."""
    return weight if is_traceable_wrapper_subclass(weight) else fake


def _check_traceable(graph: fx.GraphModule) -> None:
    """Refuse graphs with calls that set a state for others, or call functions: a trace keeps operators alone."""
    for node in graph.graph.nodes:
        target = node.target
        if target is _enter_autocast:
            raise NotTraceable("it has an autocast region of its own; put autocast around the call instead")
        if target is torch._C._set_grad_enabled and node.args[0]:
            raise NotTraceable("it turns gradients on, and this backend is for inference")
        if isinstance(target, HigherOrderOperator) or "functorch" in (getattr(target, "__module__", None) or ""):
            raise NotTraceable(f"it calls {getattr(target, '__name__', target)}, which is no operator on tensors")


def _bind(program: Program, weights: Sequence[Tensor]) -> None:
    """The argument "weights" becomes constants."""
    written = changing(program)
    nodes = [node for node in program.graph.find_nodes(op="placeholder") if node.meta["argument"] == "weights"]
    for i, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
        if node in written:
            raise NotTraceable("it writes to a parameter; make what changes a buffer")
        node.replace_all_uses_with(weight_node(program, f"weight_{i}", weight))
        program.graph.erase_node(node)
    del program.specs["weights"]
    program.module.recompile()


def _state(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version


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
