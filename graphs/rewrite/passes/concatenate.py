"""Several linear layers as one product."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...joined_weights import cat_rows, joined_view
from ..nodes import K, calls, drop, finish, insert, like, operands, weight_node, written
from ..program import Program, Report, constant, value_of

PRODUCTS: dict[Any, int] = {K.linear.default: 1, K.fp8_matmul.default: 2}
"""Linear layers: how many leading arguments are their input; weights, scales and biases follow."""
SLICE = torch.ops.aten.slice.Tensor


def concatenate(program: Program) -> Report:
    """Linear layers of one input become one product: those whose results are concatenated, and those whose weights lie
    side by side (`graphs.joined_weights`).

    Weights that already lie side by side are taken as they are, others are copied.
    """
    report = Report("concatenate")
    for cat in calls(program, torch.ops.aten.cat.default):
        parts, *axes = operands(cat)
        axis, last = axes[0] if axes else 0, value_of(cat).dim() - 1
        if axis in (-1, last) and _same_input(parts):
            _merge(program, parts, cat, report)
    for parts in list(_side_by_side(program)):
        _merge(program, parts, None, report)
    finish(program)
    return report


def _merge(program: Program, parts: list[fx.Node], cat: fx.Node | None, report: Report) -> None:
    """Put one product in the place of `parts` and of the call that concatenates them, where their weights allow it."""
    joined = _joined_weights(program, parts)
    if joined is None:
        return
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    first = min(parts, key=lambda part: order[part])
    target: Any = first.target
    inputs, args = PRODUCTS[target], operands(first)
    rest = args[inputs + len(joined) :]
    width = sum(value_of(part).shape[-1] for part in parts)
    wide = like(first, *value_of(first).shape[:-1], width)
    product = insert(first, target, (*args[:inputs], *joined, *rest), wide)
    _hand_out(product, parts, cat)
    report.add(f"{joined[0].meta['weight']} {tuple(value_of(joined[0]).shape)}", first)
    if cat is not None:
        cat.replace_all_uses_with(product)
        drop(program, cat)


def _hand_out(product: fx.Node, parts: list[fx.Node], cat: fx.Node | None) -> None:
    """What else reads a part reads its columns of the product."""
    last, behind = value_of(product).dim() - 1, product.next
    for part in dict.fromkeys(parts):
        if any(user is not cat for user in part.users):
            width = value_of(part).shape[-1]
            start = sum(value_of(other).shape[-1] for other in parts[: parts.index(part)])
            piece = insert(behind, SLICE, (product, last, start, start + width), part.meta["val"])
            part.replace_all_uses_with(piece, delete_user_cb=lambda user: user is not cat)


def _side_by_side(program: Program) -> Iterator[list[fx.Node]]:
    """Products of one input, in the order in which their weights lie behind one another in one tensor."""
    readers: dict[Any, list[fx.Node]] = {}
    for node in calls(program, *PRODUCTS):
        inputs = PRODUCTS[node.target]
        x, weight = operands(node)[0], operands(node)[inputs]
        if node.users and weight.op == "get_attr" and not any(x in written(user) for user in x.users):
            readers.setdefault((node.target, node.args[:inputs]), []).append(node)

    def rows(node: fx.Node) -> Tensor:
        return constant(program.module, operands(node)[PRODUCTS[node.target]]).detach()

    def place(node: fx.Node) -> tuple[int, int]:
        return rows(node).untyped_storage()._cdata, int(rows(node).storage_offset())

    for nodes in readers.values():
        run: list[fx.Node] = []
        for node in sorted(nodes, key=place):
            if run and joined_view([rows(part) for part in (*run, node)]) is None:
                if len(run) > 1:
                    yield run
                run = []
            run.append(node)
        if len(run) > 1:
            yield run


def _same_input(parts: list[fx.Node]) -> bool:
    target = parts[0].target
    if len(parts) < 2 or target not in PRODUCTS:
        return False
    inputs = PRODUCTS[target]
    return all(part.target is target and part.args[:inputs] == parts[0].args[:inputs] for part in parts)


def _joined_weights(program: Program, parts: list[fx.Node]) -> list[Any] | None:
    """Weights, scales and biases of several products as those of one, or None when they are not constants alike."""
    inputs = PRODUCTS[parts[0].target]
    columns: list[tuple[Any, ...]] = []
    for column in zip(*(operands(part)[inputs:] for part in parts), strict=True):
        if not all(node is None or isinstance(node, fx.Node) for node in column):
            break  # dtypes and switches, which follow
        columns.append(column)
    if parts[0].target is K.fp8_matmul.default and any(value_of(scale).dim() < 2 for scale in columns[1]):
        return None  # one scale for a whole weight: each product has its own
    rest = {operands(part)[inputs + len(columns) :] for part in parts}
    if len(rest) > 1 or not all(_joinable(program, column) for column in columns):
        return None
    return [_join(program, column) for column in columns]


def _joinable(program: Program, column: tuple[Any, ...]) -> bool:
    if all(node is None for node in column):
        return True
    if any(node is None or node.op != "get_attr" for node in column):
        return False
    values = [constant(program.module, node) for node in column]
    return len({value.dtype for value in values}) == 1


def _join(program: Program, column: tuple[Any, ...]) -> fx.Node | None:
    if column[0] is None:
        return None
    name = f"{column[0].meta['weight']}+{len(column) - 1}"
    parts = [constant(program.module, node).detach() for node in column]
    view = joined_view(parts)  # already side by side: no copy
    return weight_node(program, name, cat_rows(parts) if view is None else view)
