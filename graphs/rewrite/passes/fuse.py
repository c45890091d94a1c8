"""Residual sums and norms as one kernel."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..nodes import TO, VIEWS, K, calls, drop, finish, like, mutates, operands, outputs, source
from ..program import Program, Report, value_of

SUMS = (K.gated_residual.default, torch.ops.aten.add.Tensor, K.audio_residual.default)


@dataclass(frozen=True)
class Seam:
    """A residual sum and the norm that reads it; `stream`: which of the sum and its cast goes on."""

    total: fx.Node
    cast: fx.Node | None
    stream: fx.Node

    @property
    def name(self) -> str:
        return f"{self.total.name} + {self.cast.name}" if self.cast else self.total.name


@dataclass(frozen=True)
class Norm:
    """A norm's tables: those of `adaln`, or an affine layer norm's weight and bias as scale and shift."""

    shift: Any
    scale: Any
    rows: Any
    eps: float
    affine: bool

    @classmethod
    def of(cls, node: fx.Node) -> "Norm":
        if node.target is K.adaln.default:
            _, shift, scale, rows, eps, _ = operands(node)
            return cls(shift, scale, rows, eps, affine=False)
        _, weight, bias, eps = operands(node)
        return cls(bias, weight, None, eps, affine=True)


def fuse(program: Program) -> Report:
    """A residual sum and the norm behind it become one kernel: one read, two writes."""
    report = Report("fuse")
    for node in calls(program, K.adaln.default, K.layer_norm.default):
        seam, norm = _seam(node), Norm.of(node)
        if seam is None or norm.scale is None or norm.shift is None:
            continue
        x, y, gate, rows = _summands(seam.total)
        if gate is not None and not norm.affine and (norm.rows is not rows or not _alike(gate, norm)):
            continue
        rows = rows if norm.affine else norm.rows
        tables = [n for n in (norm.shift, norm.scale, rows) if isinstance(n, fx.Node)]
        if not _come_before(program, seam.total, tables):
            continue
        dtypes = value_of(seam.stream).dtype, value_of(source(node)).dtype, value_of(node).dtype
        args = (x, y, gate, norm.shift, norm.scale, rows, norm.eps, norm.affine, *dtypes)
        made, h = outputs(seam.total, K.residual_norm.default, args, like(seam.stream), like(node))
        report.add(f"{seam.name} + {node.name}", node)
        node.replace_all_uses_with(h)
        seam.stream.replace_all_uses_with(made)
        drop(program, node, *(n for n in (seam.cast, seam.total) if n is not None))
    finish(program)
    return report


def _alike(gate: fx.Node, norm: Norm) -> bool:
    """Whether the tables [B, R, D] have one R, as `residual_norm` wants it; R = 1 goes with any."""
    return len({value_of(table).shape[1] for table in (gate, norm.shift, norm.scale)} - {1}) <= 1


def _come_before(program: Program, total: fx.Node, tables: list[fx.Node]) -> bool:
    """Whether the norm's tables are there when the sum is; moves them there where nothing speaks against it."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    late: set[fx.Node] = set()
    stack = list(tables)
    while stack:
        node = stack.pop()
        if order[node] > order[total] and node not in late:
            late.add(node)
            stack += node.all_input_nodes
        elif node is total:
            return False
    if any(node.target not in VIEWS for node in late) and any(mutates(node) for node in order):
        return False  # what is moved could read what is written meanwhile
    for node in sorted(late, key=lambda n: order[n]):
        total.prepend(node)
    return True


def _seam(norm: fx.Node) -> Seam | None:
    """The residual sum that `norm` reads, with or without a cast between them, or with one down and one up again."""
    read = source(norm)
    if read.target is TO and source(read).target is TO:
        read = source(read)  # the stream goes on narrow, the norm widens it
        if len(source(read).users) > 1:
            return None
    cast = read if read.target is TO else None
    total = read if cast is None else source(cast)
    if total.target not in SUMS or not _is_residual(total):
        return None
    if cast is None:
        return Seam(total, None, total)
    if len(total.users) == 1 or cast is not source(norm):
        return Seam(total, cast, cast)  # the cast is what goes on
    return Seam(total, cast, total) if len(cast.users) == 1 else None


def _is_residual(total: fx.Node) -> bool:
    x, y = operands(total)[:2]
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)) or len(value_of(total).shape) != 3 or total.kwargs:
        return False
    if total.target is K.audio_residual.default and operands(total)[2] is not None:
        return False  # several actors: their masks are the op's own business
    return value_of(x).shape == value_of(y).shape == value_of(total).shape


def _summands(total: fx.Node) -> tuple[Any, Any, Any, Any]:
    """x, y, gate, rows of a residual sum."""
    args = operands(total)
    return args if total.target is K.gated_residual.default else (*args[:2], None, None)
