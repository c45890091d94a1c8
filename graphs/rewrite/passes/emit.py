"""Who quantises a tensor: once for all its readers, and the kernel that makes it where that can."""

import operator

import torch
from torch import fx

from ....kernels.attention_joined import ROWS_AT
from ..nodes import E4M3, TO, K, calls, drop, finish, insert, like, operands, outputs, source, users
from ..program import Program, Report, value_of

QUANTIZE = K.quantize_rows.default
CAT = torch.ops.aten.cat.default
SLICE = torch.ops.aten.slice.Tensor
VIEW = torch.ops.aten.view.default
VIEW_AS = torch.ops.aten.view.dtype


def share(program: Program) -> Report:
    """A tensor that several FP8 products read is quantised once."""
    report = Report("share")
    first: dict[fx.Node, fx.Node] = {}
    for node in calls(program, QUANTIZE):
        known = first.setdefault(source(node), node)
        if known is node:
            continue
        report.add(f"{source(node).name} quantised once", node)
        _hand_over(program, node, {operands(item)[1]: item for item in known.users})
    finish(program)
    return report


def emit(program: Program) -> Report:
    """A tensor that only FP8 products read is quantised by the kernel that makes it."""
    report = share(program)
    report.name = "emit"
    for node in calls(program, QUANTIZE):
        x, reader = source(node), node
        while users(x) == [reader] and _passes_rows_on(x):
            x, reader = source(x), x
        made = _emitted(program, x) if users(x) == [reader] else None
        if made is None:
            continue
        report.add(f"{x.name} leaves its kernel in e4m3", node)
        widths = value_of(source(node)).shape[-1], 1
        x8, descale = (_shaped(node, part, width) for part, width in zip(made, widths, strict=True))
        _hand_over(program, node, {0: x8, 1: descale})
    finish(program)
    return report


def _hand_over(program: Program, node: fx.Node, results: dict[int, fx.Node]) -> None:
    """Readers of the tuple that `node` returns read `results`."""
    for item in users(node):
        item.replace_all_uses_with(results[operands(item)[1]])
        drop(program, item)
    drop(program, node)


def _shaped(node: fx.Node, part: fx.Node, width: int) -> fx.Node:
    """A result of another kernel with the rows that `node` quantises, of `width` numbers each."""
    shape = [*value_of(source(node)).shape[:-1], width]
    if list(value_of(part).shape) == shape:
        return part
    return insert(node, VIEW, (part, shape), like(part, *shape))


def _passes_rows_on(x: fx.Node) -> bool:
    """Whether `x` only counts the rows of what it reads in another way, or rounds them to bfloat16, as kernels do."""
    if x.target is TO:
        return value_of(x).dtype == torch.bfloat16 and value_of(source(x)).dtype == torch.float32
    if x.target not in (torch.ops.aten.unflatten.int, torch.ops.aten.flatten.using_ints, VIEW):
        return False
    if _joined_attention(source(x)):
        return True  # it has one scale for all heads
    return value_of(x).shape[-1] == value_of(source(x)).shape[-1]


def _joined_attention(x: fx.Node) -> list[fx.Node]:
    """The calls of attention over a joined cache that `x` is, one, or several samples laid behind one another."""
    parts = operands(x)[0] if x.target is CAT and len(operands(x)) == 1 else [x]
    return list(parts) if all(part.target is K.attention_joined.default for part in parts) else []


def _attention_in_e4m3(x: fx.Node, calls: list[fx.Node]) -> list[fx.Node]:
    """`x`, made of `calls`, in e4m3, and its descales [B, L, 1], which lie ready in the scales (`joined_scales`)."""
    made = []
    for call in calls:
        batch, queries = value_of(call).shape[:2]
        scales, end = operands(call)[4], ROWS_AT + batch * queries
        rows = insert(call, SLICE, (scales, 0, ROWS_AT, end), like(scales, batch * queries))
        x8 = insert(call, K.attention_joined_fp8.default, operands(call), like(call, dtype=E4M3))
        made.append([x8, insert(call, VIEW, (rows, [batch, queries, 1]), like(rows, batch, queries, 1))])
    if len(made) == 1:
        return made[0]
    samples = len(value_of(x))
    # e4m3 as bytes, which every PyTorch can join
    parts = [insert(x, VIEW_AS, (x8, torch.uint8), like(x8, dtype=torch.uint8)) for x8, _ in made]
    whole = insert(x, CAT, (parts,), like(x, dtype=torch.uint8))
    descales = [descale for _, descale in made]
    return [
        insert(x, VIEW_AS, (whole, E4M3), like(x, dtype=E4M3)),
        insert(x, CAT, (descales,), like(descales[0], samples, *value_of(descales[0]).shape[1:])),
    ]


def _emitted(program: Program, x: fx.Node) -> list[fx.Node] | None:
    """`x` in e4m3 and its descales, made by its own kernel; None where that cannot.

    These kernels round to bfloat16 first, as a linear layer in bfloat16 rounds a float32 input; attention over a joined
    cache has made e4m3 already.
    """
    if value_of(x).dtype not in (torch.bfloat16, torch.float32):
        return None
    values = like(x, dtype=E4M3), like(x, *value_of(x).shape[:-1], 1, dtype=torch.float32)
    args = operands(x)
    if x.target is torch.ops.aten.gelu.default and x.kwargs.get("approximate") == "tanh":
        return outputs(x, K.gelu_quantize_rows.default, args[:1], *values)
    if x.target is K.adaln.default:
        return outputs(x, K.adaln_fp8.default, args[:5], *values)
    if _joined_attention(x):
        return _attention_in_e4m3(x, _joined_attention(x))
    call = args[0] if x.target is operator.getitem else None
    if not isinstance(call, fx.Node) or call.target is not K.residual_norm.default or args[1] != 1:
        return None
    inputs, stream_dtype = operands(call)[:10], operands(call)[8]
    stream, *made = outputs(
        call, K.residual_norm_fp8.default, inputs, like(inputs[0], dtype=stream_dtype), *values
    )  # fmt: skip
    for user in users(call):
        if operands(user)[1] == 0:
            user.replace_all_uses_with(stream)
            drop(program, user)
    return made
