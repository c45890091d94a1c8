"""What a graph costs: FLOPs and bytes of every call.

FLOPs count products, convolutions and attention (2 a multiply-add); norms, rotations and other pointwise work count
none, their time is their bytes. Bytes: every input is read once and every output written once; views move nothing; an
op that writes into a buffer in place moves the rows that it writes. Shapes alone decide, so meta tensors will do.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import E4M3, VIEWS, K, mutates, operands, written
from .program import value_of
from .work import Work

ATEN = torch.ops.aten


def measure(graph: fx.Graph) -> list[Work]:
    """The work of every call that does some, in order; views, weights and inputs do none."""
    return [
        Work(node.meta.get("layer", ""), _flops(node), _bytes(node), _multiplies_in_e4m3(node))
        for node in graph.nodes
        if node.op == "call_function" and node.target not in VIEWS
    ]


# FLOPs


def _product(node: fx.Node) -> float:
    """linear(x [..., K], weight [N, K]), fp8_matmul(x8, descale, weight8, ...)."""
    args = operands(node)
    weight = args[2] if node.target is K.fp8_matmul.default else args[1]
    return 2.0 * math.prod(value_of(args[0]).shape) * value_of(weight).shape[0]


def _attention(node: fx.Node) -> float:
    """q [B, Lq, H, d] against segments of keys [B, L, H, d]: scores and weighted values, at full length."""
    q, keys = operands(node)[:2]
    batch, queries, heads, size = value_of(q).shape
    return 4.0 * batch * queries * heads * size * sum(value_of(key).shape[1] for key in keys)


def _attention_fp8(node: fx.Node) -> float:
    """The same with keys in slots: `slots` holds count, rows and padded rows of each segment."""
    batch, queries, heads, size = value_of(operands(node)[0]).shape
    slots = operands(node)[6]
    rows = sum(count * length for count, length in zip(slots[0::3], slots[1::3], strict=True))
    return 4.0 * batch * queries * heads * size * rows


def _attention_joined(node: fx.Node) -> float:
    """The same with all keys [B, L, H, d] in one tensor."""
    batch, queries, heads, size = value_of(operands(node)[0]).shape
    return 4.0 * batch * queries * heads * size * value_of(operands(node)[1]).shape[1]


def _sdpa(node: fx.Node) -> float:
    """q [..., Lq, d], k [..., L, d]."""
    q, k = (value_of(part) for part in operands(node)[:2])
    return 4.0 * math.prod(q.shape) * k.shape[-2]


def _matmul(node: fx.Node) -> float:
    a, b = (value_of(part) for part in operands(node)[:2])
    return 2.0 * math.prod(value_of(node).shape or (1,)) * (a.shape[-1] if b.dim() else 1)


def _convolution(node: fx.Node) -> float:
    """Weight [Cout, Cin / groups, ...]."""
    weight = value_of(operands(node)[1])
    return 2.0 * math.prod(value_of(node).shape) * math.prod(weight.shape[1:])


FLOPS: dict[Any, Callable[[fx.Node], float]] = {
    K.linear.default: _product,
    K.fp8_matmul.default: _product,
    K.rope_attention.default: _attention,
    K.attention_fp8.default: _attention_fp8,
    K.attention_joined.default: _attention_joined,
    K.attention_joined_fp8.default: _attention_joined,
    ATEN.scaled_dot_product_attention.default: _sdpa,
    ATEN.linear.default: _product,
    ATEN.matmul.default: _matmul,
    ATEN.mm.default: _matmul,
    ATEN.bmm.default: _matmul,
    ATEN.conv1d.default: _convolution,
    ATEN.conv2d.default: _convolution,
    ATEN.conv3d.default: _convolution,
}
"""Ops that multiply -> their FLOPs from the shapes of a call."""


def _flops(node: fx.Node) -> float:
    formula = FLOPS.get(node.target)
    return 0.0 if formula is None else formula(node)


def _multiplies_in_e4m3(node: fx.Node) -> bool:
    return node.target in FLOPS and value_of(node.all_input_nodes[0]).dtype == E4M3


# Bytes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _size(value: Any) -> float:
    """Bytes of what a node holds; an axis that `expand` made is read once."""
    found = 0.0
    for tensor in _tensors(value):
        own = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 1]
        found += math.prod(own) * tensor.element_size()
    return found


def _bytes(node: fx.Node) -> float:
    targets = written(node)
    read = sum(_size(value_of(source)) for source in node.all_input_nodes if source not in targets)
    made = 0.0 if node.target in IN_PLACE else _size(node.meta.get("val"))
    return read + made + (_stored(node, targets) if mutates(node) else 0.0)


IN_PLACE = {ATEN.copy_.default, ATEN.add_.Tensor, ATEN.mul_.Tensor}


def _stored(node: fx.Node, targets: list[fx.Node]) -> float:
    """What a call that writes in place writes: as many elements as its first input that is not written has, or for
    the fused projections [.., 3D] a third of them into each ring."""
    source = next((part for part in node.all_input_nodes if part not in targets), None)
    if source is None:
        return sum(_size(value_of(target)) for target in targets)
    rows = math.prod(value_of(source).shape)
    if node.target in (K.qkv_norm_rope.default, K.qkv_norm_rope_fp8.default):
        rows //= 3
    return float(sum(min(rows, value_of(t).numel()) * value_of(t).element_size() for t in targets))
