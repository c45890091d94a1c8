"""A model's call as a graph: traced once, rewritten by passes, called with the same arguments.

The graph is `torch.fx` over ATen operators before decomposition (`aten.gelu`) and `kinora::` ops, one node each.
Arguments are pytrees of tensors, each with a lifetime: how long its values stay (`LIFETIMES`). Weights and other
tensors that the function closes over are constants of the graph, which live as long as the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...kernels import dispatch
from ..capture import RECORDING
from .work import Work

LIFETIMES = ("model", "schedule", "prompt", "block", "step")
"""From the longest: weights; the noise levels; a prompt; a block's audio and place; one denoising step."""


@dataclass(frozen=True)
class Argument:
    """One argument of a program: its pytree, and the lifetime of its tensors."""

    value: Any
    lifetime: str

    def __post_init__(self) -> None:
        if self.lifetime not in LIFETIMES:
            raise ValueError(f"lifetime {self.lifetime!r} is not known; use one of {LIFETIMES}")


@dataclass(frozen=True)
class Prepared:
    """An argument as the graph reads it: its tensors, or what a prologue made of them."""

    tensors: list[Tensor]


@dataclass
class Report:
    """What one pass did: a count, a line a match, and which layer of the model each of these lines is about."""

    name: str
    matches: int = 0
    lines: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def add(self, line: str, node: fx.Node) -> None:
        self.matches += 1
        self.lines.append(line)
        self.layers.append(node.meta.get("layer", ""))


@dataclass
class Program:
    """A graph with the shape of its arguments; call it with pytrees of the structure it was traced with."""

    module: fx.GraphModule
    specs: dict[str, pytree.TreeSpec]
    reports: list[Report] = field(default_factory=list)
    prologues: dict[str, tuple[fx.GraphModule, list[bool]]] = field(default_factory=dict)
    """Argument -> what is computed from it ahead, and which of its tensors that reads; see `passes.fold`."""
    traced: list[Work] = field(default_factory=list)
    """What the calls did before the passes ran."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def flat(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of all arguments, in the order of the graph's inputs."""
        if arguments.keys() != self.specs.keys():
            raise TypeError(f"this program takes {', '.join(self.specs)}; got {', '.join(arguments)}")
        tensors: list[Tensor] = []
        for name in self.specs:
            value = arguments[name]
            tensors += value.tensors if isinstance(value, Prepared) else self.prepare(name, value).tensors
        return tensors

    def prepare(self, name: str, value: Any) -> "Prepared":
        """What the graph needs of argument `name`, computed ahead; pass it in place of the value."""
        leaves, found = pytree.tree_flatten(value)
        if found != self.specs[name]:
            raise TypeError(f"argument {name} has another structure than the program was traced with")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name not in self.prologues:
            return Prepared(tensors)
        module, used = self.prologues[name]
        with torch.no_grad():
            return Prepared(list(module(*(t for t, needed in zip(tensors, used, strict=True) if needed))))

    def __call__(self, **arguments: Any) -> Any:
        return self.module(*self.flat(arguments))


def trace(function: Callable[..., Any], arguments: Mapping[str, Argument], model: nn.Module | None = None) -> Program:
    """Trace `function(**arguments)`, whose result is a tensor or a tuple of tensors, for the shapes of `arguments`.

    `model` names the weights in reports. Runs on fake tensors: nothing is computed, and no memory is taken.
    TypeError for a model whose weights are tensor subclasses, as torchao makes them.
    """
    _check_plain(model)
    specs: dict[str, pytree.TreeSpec] = {}
    leaves: dict[str, list[Any]] = {}
    tensors: list[Tensor] = []
    places: list[tuple[str, str]] = []
    for name, argument in arguments.items():
        leaves[name], specs[name] = pytree.tree_flatten(argument.value)
        found = [leaf for leaf in leaves[name] if isinstance(leaf, Tensor)]
        tensors += found
        places += [(name, argument.lifetime)] * len(found)

    def flat(*values: Tensor) -> Any:
        moving = iter(values)
        rebuilt = {
            name: pytree.tree_unflatten(
                [next(moving) if isinstance(leaf, Tensor) else leaf for leaf in leaves[name]], spec
            )
            for name, spec in specs.items()
        }
        return function(**rebuilt)

    with RECORDING, dispatch.using(True), torch.no_grad(), _layers(model):
        module = make_fx(flat, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*tensors)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, (name, lifetime) in zip(inputs, places, strict=True):
        node.meta["argument"], node.meta["lifetime"] = name, lifetime
    names = {} if model is None else {id(p): name for name, p in (*model.named_parameters(), *model.named_buffers())}
    for node in module.graph.nodes:
        node.meta["layer"] = node.meta.pop("custom", {}).get("layer", "")
        if node.op == "get_attr":
            node.meta["weight"] = names.get(id(constant(module, node)), str(node.target))
    return Program(module, specs)


def _check_plain(model: nn.Module | None) -> None:
    for name, weight in [] if model is None else model.named_parameters():
        if is_traceable_wrapper_subclass(weight):
            raise TypeError(
                f"weight {name} is a {type(weight).__name__}; the compiler rewrites plain tensors only. Quantise with "
                "Recipe(fp8=True) or quantize_linears, or run this model uncaptured or through torch.compile"
            )


@contextmanager
def _layers(model: nn.Module | None) -> Iterator[None]:
    """While tracing, every node learns which layer of `model` it belongs to: "blocks.3", "head"."""
    inside: list[AbstractContextManager[Any]] = []

    def enter(layer: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            inside.append(traceback.annotate({"layer": layer}))
            inside[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        inside.pop().__exit__(None, None, None)

    handles = []
    for name, module in [] if model is None else model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(layer_name(name))))
            handles.append(module.register_forward_hook(leave))
    try:
        with traceback.preserve_node_meta():
            yield
    finally:
        for handle in handles:
            handle.remove()


def layer_name(name: str) -> str:
    """The layer of a module or weight: "blocks.3.ffn.0" -> "blocks.3", "head.head" -> "head"."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: number + 1])


def constant(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor behind a `get_attr` node."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def add_constant(module: fx.GraphModule, name: str, value: Tensor) -> str:
    """Keep `value` in the graph's module under a free name like `name`; returns that name."""
    target, count = name.replace(".", "_"), 0
    while hasattr(module, target):
        count += 1
        target = f"{name.replace('.', '_')}_{count}"
    module.register_buffer(target, value, persistent=False)
    return target


def value_of(node: fx.Node) -> Any:
    """Shape and dtype that tracing saw."""
    return node.meta["val"]
