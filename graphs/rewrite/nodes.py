"""What every pass does with nodes: find calls, read operands, insert, replace, drop."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels import attention_fp8, kv_cache, ops  # noqa: F401  they register what `K` finds
from .program import Program, add_constant, value_of

K = torch.ops.kinora
TO = torch.ops.aten.to.dtype
E4M3 = torch.float8_e4m3fn

VIEWS = {
    torch.ops.aten.expand.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.unbind.int,
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.chunk.default,
    torch.ops.aten.unflatten.int,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.view.default,
    torch.ops.aten.view.dtype,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.numpy_T.default,
    torch.ops.aten.detach.default,
    operator.getitem,
}
"""Calls that move nothing: they cost no time, and taking them out of a loop saves none."""


def calls(program: Program, *targets: Callable[..., Any]) -> Iterator[fx.Node]:
    """Nodes that call one of `targets`, in order; those that go meanwhile are skipped."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target in targets and not node._erased:
            yield node


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a call: nodes where they are tensors, lists of such, plain values."""
    return node.args


def source(node: fx.Node, index: int = 0) -> fx.Node:
    """The node that an argument of `node` is; TypeError where it is a plain value."""
    found = operands(node)[index]
    if not isinstance(found, fx.Node):
        raise TypeError(f"argument {index} of {node} is {found!r}, no tensor of the graph")
    return found


def users(node: fx.Node) -> list[fx.Node]:
    """Calls that read `node`, as they are now."""
    return list(node.users)


def mutates(node: fx.Node) -> bool:
    """Whether the call writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def written(node: fx.Node) -> list[fx.Node]:
    """Arguments that the call writes into."""
    if not mutates(node):
        return []
    found: list[fx.Node] = []
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found


def owners(*nodes: fx.Node) -> set[fx.Node]:
    """The tensors whose memory `nodes` may be: themselves, or what they are views of."""
    found: set[fx.Node] = set()
    seen, stack = set(nodes), list(nodes)
    while stack:
        node = stack.pop()
        if not _shares(node):
            found.add(node)
            continue
        stack += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return found


def _shares(node: fx.Node) -> bool:
    """Whether the result of a call may share memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    returns = [] if schema is None else schema.returns
    return node.target in VIEWS or any(result.alias_info is not None for result in returns)


def changing(program: Program) -> set[fx.Node]:
    """Tensors that some call writes into, directly or through views."""
    return owners(*(tensor for node in program.graph.nodes for tensor in written(node)))


def insert(before: fx.Node, target: Callable[..., Any], args: Sequence[Any], value: Any) -> fx.Node:
    """A call before a node, in its layer; `value`: a tensor (or tuple) of the shape and dtype of its result."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, tuple(args))
    node.meta.update(val=value, layer=before.meta.get("layer", ""))
    return node


def outputs(before: fx.Node, target: Callable[..., Any], args: Sequence[Any], *values: Tensor) -> list[fx.Node]:
    """`insert` for a call that returns a tuple: one node for each of its tensors."""
    call = insert(before, target, args, values)
    return [insert(before, operator.getitem, (call, i), value) for i, value in enumerate(values)]


def weight_node(program: Program, name: str, value: Tensor) -> fx.Node:
    """A new constant of the graph."""
    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        node = program.graph.get_attr(add_constant(program.module, name, value))
    node.meta.update(val=value, weight=name)
    return node


def like(node: fx.Node, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Shape and dtype as a tensor without memory; of `node` where not given."""
    value = value_of(node)
    return torch.empty(shape or value.shape, dtype=dtype or value.dtype, device="meta")


def replace(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Every reader of `old` reads `new`; `old` goes, and what only it read."""
    old.replace_all_uses_with(new)
    drop(program, old)


def drop(program: Program, *nodes: fx.Node) -> None:
    """Erase nodes that nothing reads, then what only they read; a weight leaves the module with its last node."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node._erased or node.users or node.op not in ("call_function", "get_attr") or mutates(node):
            continue
        stack += node.all_input_nodes
        program.graph.erase_node(node)
        if node.op == "get_attr":
            _free(program, str(node.target))


def _free(program: Program, target: str) -> None:
    name = target.split(".")[0]
    held = (str(node.target).split(".")[0] for node in program.graph.find_nodes(op="get_attr", sort=False))
    if name not in held and hasattr(program.module, name):
        delattr(program.module, name)


def finish(program: Program) -> None:
    """Drop what nothing reads, weights included, and make the module runnable again."""
    drop(program, *reversed(list(program.graph.nodes)))
    program.graph.lint()
    program.module.recompile()
