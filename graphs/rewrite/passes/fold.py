"""What changes less often than a step leaves the step."""

import torch
from torch import fx

from ..nodes import TO, VIEWS, changing, drop, finish, mutates, replace, source, weight_node
from ..program import Program, Report

ATEN = torch.ops.aten
COUNTING = (ATEN.arange.default, ATEN.arange.start, ATEN.arange.start_step)
"""Calls without inputs that give the same every time."""


def fold(program: Program) -> Report:
    """What depends on weights alone is computed now; what depends on the noise level too, once per noise level.

    The latter becomes `program.prologues["schedule"]`; its results are inputs of the graph in place of the argument.
    """
    report = Report("fold")
    lifetime = _lifetimes(program)
    _fold_weights(program, lifetime, report)
    _fold_schedule(program, lifetime, report)
    finish(program)
    return report


def _lifetimes(program: Program) -> dict[fx.Node, str]:
    """Node -> "model", "schedule", or that of its shortest-lived input.

    What is written in place changes as often as a step.
    """
    lifetime: dict[fx.Node, str] = {}
    written = changing(program)
    for node in program.graph.nodes:
        if node in written:
            lifetime[node] = "step"
        elif node.op == "placeholder":
            lifetime[node] = node.meta["lifetime"]
        elif node.op == "get_attr":
            lifetime[node] = "model"
        elif node.op == "call_function" and not mutates(node):
            needs = {lifetime.get(read, "step") for read in node.all_input_nodes}
            known = needs <= {"model", "schedule"} and (bool(needs) or node.target in COUNTING)
            lifetime[node] = ("schedule" if "schedule" in needs else "model") if known else "step"
    return lifetime


def _boundary(program: Program, lifetime: dict[fx.Node, str], which: str) -> list[fx.Node]:
    """Nodes of a lifetime that nodes of a shorter one read, and that some arithmetic made."""
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or lifetime.get(node) != which:
            continue
        if any(lifetime.get(user, "step") != which for user in node.users) and _computed(node, lifetime, which):
            found.append(node)
    return found


def _computed(node: fx.Node, lifetime: dict[fx.Node, str], which: str) -> bool:
    """Whether more than views stands between `node` and the inputs of its lifetime."""
    if node.op != "call_function" or lifetime.get(node) != which:
        return False
    return node.target not in VIEWS or any(_computed(read, lifetime, which) for read in node.all_input_nodes)


def _subgraph(program: Program, results: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of the graph that makes `results`, as a module, and the placeholders that it reads."""
    needed: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(tuple(copies[node] for node in results))
    inputs = [node for node in program.graph.nodes if node in needed and node.op == "placeholder"]
    return fx.GraphModule(program.module, part), inputs


def _fold_weights(program: Program, lifetime: dict[fx.Node, str], report: Report) -> None:
    results = _boundary(program, lifetime, "model")
    if not results:
        return
    part, _ = _subgraph(program, results)
    with torch.no_grad():
        values = part()
    for node, value in zip(results, values, strict=True):
        made = weight_node(program, f"folded_{node.name}", value.clone())
        made.meta["weight"] = _uncast(node).meta.get("weight", made.meta["weight"])
        lifetime[made] = "model"
        report.add(f"{node.name} {tuple(value.shape)}: from weights alone", node)
        replace(program, node, made)


def _uncast(node: fx.Node) -> fx.Node:
    """What a chain of casts reads: a cast of a weight goes on under the weight's name, by which recipes know it."""
    while node.target is TO:
        node = source(node)
    return node


def _fold_schedule(program: Program, lifetime: dict[fx.Node, str], report: Report) -> None:
    results = _boundary(program, lifetime, "schedule")
    if not results:
        return
    part, inputs = _subgraph(program, results)
    arguments = {node.meta["argument"] for node in inputs}
    if len(arguments) != 1:
        raise ValueError(f"arguments {sorted(arguments)} have the lifetime 'schedule'; a program may have one such")
    (argument,) = arguments
    old = [node for node in program.graph.nodes if node.op == "placeholder" and node.meta["argument"] == argument]
    for node in results:
        with program.graph.inserting_before(old[0]):
            made = program.graph.placeholder(f"{argument}_{node.name}")
        made.meta.update(val=node.meta["val"], argument=argument, lifetime="schedule")
        report.add(f"{node.name}: once per noise level", node)
        node.replace_all_uses_with(made)
    drop(program, *results)
    used = [node in inputs for node in old]
    finish(program)  # so that the old inputs have no readers
    for node in old:
        if node.users:
            raise ValueError(f"{node} of argument {argument} is still read in the loop; only views may be left there")
        program.graph.erase_node(node)
    program.prologues[argument] = (part, used)
