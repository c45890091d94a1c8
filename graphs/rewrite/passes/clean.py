"""Calls that change nothing go, and every weight becomes one node."""

import torch
from torch import fx

from ..nodes import TO, calls, changing, finish, insert, operands, owners, replace
from ..program import Program, Report, constant, value_of

CAT = torch.ops.aten.cat.default
SLICE = torch.ops.aten.slice.Tensor
REPEAT = torch.ops.aten.repeat_interleave.self_int
CAST_LIKE = torch.ops.aten.type_as.default


def clean(program: Program) -> Report:
    """Casts to the dtype that a tensor has, whole slices, joins and repeats of one tensor go.

    Weights come to stand before all calls.
    """
    report = Report("clean")
    for node in calls(program, CAST_LIKE):
        args = operands(node)[0], value_of(node).dtype
        replace(program, node, insert(node, TO, args, node.meta["val"]))
    written = changing(program)
    for node in calls(program, TO, CAT, SLICE, REPEAT):
        same = _same(node)
        if same is not None and node.target in (CAT, REPEAT) and _copy_wanted(program, node, same, written):
            continue
        if same is not None:
            replace(program, node, same)
            report.matches += 1
    first = next(node for node in program.graph.nodes if node.op not in ("placeholder", "get_attr"))
    seen: dict[int, fx.Node] = {}
    for node in [node for node in program.graph.nodes if node.op == "get_attr"]:
        known = seen.setdefault(id(constant(program.module, node)), node)
        if known is node:
            first.prepend(node)
        else:
            replace(program, node, known)
    report.lines = [f"{report.matches} calls that change nothing removed"]
    finish(program)
    return report


def _same(node: fx.Node) -> fx.Node | None:
    """The input that the call returns as it is, or None."""
    args = operands(node)
    if node.target is CAT:
        return args[0][0] if len(args[0]) == 1 else None
    x, *rest = args
    if node.target is TO:
        # further arguments ask for a copy or a layout
        return x if len(rest) == 1 and not node.kwargs and value_of(x).dtype == rest[0] else None
    return x if value_of(x).shape == value_of(node).shape else None


def _copy_wanted(program: Program, copy: fx.Node, source: fx.Node, written: set[fx.Node]) -> bool:
    """Whether a copy can be told from its source: something writes to one of them, or a caller, who might, has both."""
    originals = owners(source)
    results = owners(*program.graph.output_node().all_input_nodes)
    callers = any(node.op != "call_function" or node in results for node in originals)
    return not written.isdisjoint({copy, *originals}) or (copy in results and callers)
