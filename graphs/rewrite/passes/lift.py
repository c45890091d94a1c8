"""Plain PyTorch of a transformer that is not ours, recognised as the ops of `kernels/`."""

from typing import Any

import torch
from torch import fx

from ..nodes import TO, K, calls, finish, insert, mutates, operands, replace
from ..program import Program, Report, value_of

ATEN = torch.ops.aten
LAYER_NORM, LINEAR = ATEN.layer_norm.default, ATEN.linear.default
ADD, MUL, VIEW = ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.view.default


def lift(program: Program) -> Report:
    """These become one call each, with the same rounding points in half precision:

        linear(x, w, b)                            kinora::linear
        layer_norm(x) * (1 + scale) + shift        kinora::adaln          no affine
        layer_norm(x, w, b)                        kinora::layer_norm     affine
        x + y * gate                               kinora::gated_residual

    x and y are [B, L, D], norms are over D, tables broadcast along L; a norm may be between casts to float32 and back.
    Tensors are float32, bfloat16 or float16.
    A graph that writes in place is left alone: a call that moves could then read what was written.
    """
    report = Report("lift")
    if any(mutates(node) for node in program.graph.nodes):
        return report
    for found in (_linear, _adaln, _layer_norm, _gated_residual):
        for node in calls(program, LINEAR, LAYER_NORM, TO, ADD):
            call = found(node)
            if call is not None and all(value_of(n).dtype in DTYPES for n in call[1] if isinstance(n, fx.Node)):
                target, args = call
                if target in TABLES:
                    args = tuple(_rows(node, arg) if i in TABLES[target] else arg for i, arg in enumerate(args))
                made = insert(node, target, args, node.meta["val"])
                report.add(f"{node.name}: {target.name()}", node)
                replace(program, node, made)
    finish(program)
    return report


Call = tuple[Any, tuple[Any, ...]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute in."""
TABLES = {K.adaln.default: (1, 2), K.gated_residual.default: (2,)}
"""Ops that want tables [B, R, D] -> which arguments these are."""


def _rows(before: fx.Node, table: fx.Node) -> fx.Node:
    """The table with three axes."""
    value = value_of(table)
    return table if value.dim() == 3 else insert(before, VIEW, (table, [1, 1, value.shape[-1]]), value.view(1, 1, -1))


def _linear(node: fx.Node) -> Call | None:
    if node.target is not LINEAR:
        return None
    x, weight, bias = _padded(node, 3)
    return (K.linear.default, (x, weight, bias)) if value_of(x).dtype == value_of(weight).dtype else None


def _layer_norm(node: fx.Node) -> Call | None:
    norm = _norm(node)
    if norm is None:
        return None
    x, weight, bias, eps = norm
    return None if weight is None or bias is None else (K.layer_norm.default, (x, weight, bias, eps))


def _adaln(node: fx.Node) -> Call | None:
    for product, shift in _orders(node, ADD):
        for normed, factor in _orders(product, MUL):
            scale = _minus_one(factor)
            norm = _norm(_before_widening(normed))
            if scale is None or norm is None or norm[1] is not None or norm[2] is not None:
                continue
            x, eps = norm[0], norm[3]
            if not (_is_table(shift, x) and _is_table(scale, x) and len(product.users) == len(normed.users) == 1):
                continue
            if _promoted(x, scale, shift) == value_of(node).dtype:
                return K.adaln.default, (x, shift, scale, None, eps, None)
    return None


def _gated_residual(node: fx.Node) -> Call | None:
    for x, product in _orders(node, ADD):
        for y, gate in _orders(product, MUL):
            shapes = value_of(x).shape, value_of(y).shape
            if shapes[0] == shapes[1] == value_of(node).shape and _is_table(gate, x) and len(product.users) == 1:
                return K.gated_residual.default, (x, y, gate, None)
    return None


def _padded(node: fx.Node, count: int) -> tuple[Any, ...]:
    args = operands(node)
    return (*args, *(None,) * (count - len(args)))


def _orders(node: fx.Node, target: Any) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the tensors that a sum or product joins; none for other calls."""
    if node.target is not target or node.kwargs or len(node.args) != 2:
        return []
    a, b = operands(node)
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _minus_one(factor: fx.Node) -> fx.Node | None:
    """s of 1 + s."""
    if factor.target is not ADD or factor.kwargs or len(factor.args) != 2:
        return None
    a, b = operands(factor)
    if isinstance(a, fx.Node) and b == 1:
        return a
    return b if isinstance(b, fx.Node) and a == 1 else None


def _norm(node: fx.Node) -> tuple[fx.Node, Any, Any, float] | None:
    """x, weight, bias, eps of a layer norm over the last axis of x [B, L, D], its result in the dtype of x."""
    cast = node if node.target is TO else None
    norm = operands(node)[0] if cast is not None else node
    if norm.target is not LAYER_NORM:
        return None
    x, shape, weight, bias = _padded(norm, 4)[:4]
    eps = operands(norm)[4] if len(norm.args) > 4 else 1e-5
    if cast is not None:
        if x.target is not TO or value_of(x).dtype != torch.float32 or len(norm.users) != 1:
            return None
        x = operands(x)[0]
    value = value_of(x)
    fits = value.dim() == 3 and list(shape) == [value.shape[-1]] and value.dtype == value_of(node).dtype
    return (x, weight, bias, float(eps)) if fits else None


def _before_widening(normed: fx.Node) -> fx.Node:
    """What is cast to float32, where `normed` is such a cast of a norm that had its own dtype."""
    if normed.target is TO and value_of(normed).dtype == torch.float32:
        inner = operands(normed)[0]
        if len(inner.users) == 1 and _norm(inner) is not None:
            return inner
    return normed


def _is_table(node: fx.Node, x: fx.Node) -> bool:
    """[B or 1, L or 1, D] for x [B, L, D], or fewer axes that broadcast to [1, 1, D]."""
    shape, full = tuple(value_of(node).shape), tuple(value_of(x).shape)
    if len(full) != 3 or not shape or shape[-1] != full[2]:
        return False
    if len(shape) == 3:
        return shape[0] in (1, full[0]) and shape[1] in (1, full[1])
    return len(shape) < 3 and value_of(node).numel() == full[2]


def _promoted(*nodes: fx.Node) -> torch.dtype:
    dtype = value_of(nodes[0]).dtype
    for node in nodes[1:]:
        dtype = torch.promote_types(dtype, value_of(node).dtype)
    return dtype
