"""The passes: each takes a `Program`, changes its graph, and returns a `Report` of what it matched.

None changes a float32 result beyond rounding, except `quantise`, whose point it is to round.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.quantize_rows import quantize_fp8
from .program import Program, Report, add_constant, constant, value_of

K = torch.ops.kinora
TO = torch.ops.aten.to.dtype
E4M3 = torch.float8_e4m3fn
QUANTUM = 16  # FP8 products want both sides of a weight in multiples of it

# How their inputs reach them does not matter: moving them out of a loop saves nothing.
VIEWS = {
    torch.ops.aten.expand.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.unbind.int,
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.unflatten.int,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.transpose.int,
    operator.getitem,
}


def calls(program: Program, *targets: Callable[..., Any]) -> Iterator[fx.Node]:
    """Nodes that call one of `targets`, in order; the graph may change meanwhile."""
    yield from [node for node in program.graph.nodes if node.op == "call_function" and node.target in targets]


def insert(before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], value: Any) -> fx.Node:
    """A call before a node; `value`: a tensor (or tuple) of the shape and dtype of its result."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    node.meta["val"] = value
    return node


def outputs(before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], *values: Tensor) -> list[fx.Node]:
    """`insert` for a call that returns a tuple: one node for each of its tensors."""
    call = insert(before, target, args, values)
    return [insert(before, operator.getitem, (call, i), value) for i, value in enumerate(values)]


def weight_node(program: Program, name: str, value: Tensor) -> fx.Node:
    """A new constant of the graph."""
    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        node = program.graph.get_attr(add_constant(program.module, name, value))
    node.meta["val"], node.meta["weight"] = value, name
    return node


def like(node: fx.Node, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Shape and dtype as a tensor without memory; of `node` where not given."""
    value = value_of(node)
    return torch.empty(shape or value.shape, dtype=dtype or value.dtype, device="meta")


def finish(program: Program) -> None:
    """Drop what nothing uses, weights included, and make the module runnable again."""
    graph = program.graph
    for node in reversed(list(graph.nodes)):
        impure = node.op == "call_function" and _mutates(node)
        if node.op in ("call_function", "get_attr") and not node.users and not impure:
            graph.erase_node(node)
    kept = {str(node.target).split(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for name in [*program.module._parameters, *program.module._buffers]:
        if name not in kept:
            delattr(program.module, name)
    graph.lint()
    program.module.recompile()


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def clean(program: Program) -> Report:
    """Casts to the dtype that a tensor has already go; every weight is one node, before all calls."""
    report = Report("clean")
    for node in calls(program, TO):
        source = node.args[0]
        if isinstance(source, fx.Node) and value_of(source).dtype == node.args[1]:
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
            report.add("")
    first = next(node for node in program.graph.nodes if node.op not in ("placeholder", "get_attr"))
    seen: dict[int, fx.Node] = {}
    for node in [node for node in program.graph.nodes if node.op == "get_attr"]:
        known = seen.setdefault(id(constant(program.module, node)), node)
        if known is node:
            first.prepend(node)
        else:
            node.replace_all_uses_with(known)
    report.lines = [f"{report.matches} casts that change nothing removed"]
    finish(program)
    return report


def fold(program: Program) -> Report:
    """What depends on weights alone is computed now; what depends on the noise level too, once per noise level.

    The latter becomes `program.prologues["schedule"]`; its results are inputs of the graph in place of the argument.
    """
    report = Report("fold")
    lifetime: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            lifetime[node] = node.meta["lifetime"]
        elif node.op == "get_attr":
            lifetime[node] = "model"
        elif node.op == "call_function" and not _mutates(node):
            needs = {lifetime.get(source, "step") for source in node.all_input_nodes}
            known = needs <= {"model", "schedule"} and bool(needs)
            lifetime[node] = ("schedule" if "schedule" in needs else "model") if known else "step"
    _fold_weights(program, lifetime, report)
    _fold_schedule(program, lifetime, report)
    finish(program)
    return report


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
    return node.target not in VIEWS or any(_computed(source, lifetime, which) for source in node.all_input_nodes)


def _subgraph(program: Program, results: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of the graph that makes `results`, as a module, and the placeholders that it reads."""
    needed: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    part, copies = fx.Graph(), {}
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
        lifetime[made] = "model"
        node.replace_all_uses_with(made)
        report.add(f"{node.name} {tuple(value.shape)}: from weights alone")


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
        node.replace_all_uses_with(made)
    used = [node in inputs for node in old]
    finish(program)  # so that the old inputs have no users
    for node in old:
        if node.users:
            raise ValueError(f"{node} of argument {argument} is still read in the loop; only views may be left there")
        program.graph.erase_node(node)
    program.prologues[argument] = (part, used)
    report.add(f"{len(results)} tensors of argument {argument}: once per noise level")


def _cat(tensors: list[Tensor]) -> Tensor:
    """Joined along the first axis; e4m3 as bytes, which every PyTorch can join."""
    if tensors[0].dtype != E4M3:
        return torch.cat(tensors)
    return torch.cat([t.view(torch.uint8) for t in tensors]).view(E4M3)


PRODUCTS = {K.linear.default: 1, K.fp8_matmul.default: 2}
"""Linear layers: how many leading arguments are their input; weights, scales and biases follow."""


def concatenate(program: Program) -> Report:
    """Linear layers of one input whose results are concatenated become one product."""
    report = Report("concatenate")
    for cat in calls(program, torch.ops.aten.cat.default):
        parts = list(cat.args[0])
        axis, last = cat.args[1] if len(cat.args) > 1 else 0, value_of(cat).dim() - 1
        if axis not in (-1, last) or not _same_input(parts):
            continue
        inputs = PRODUCTS[parts[0].target]
        joined = _joined_weights(program, [part.args[inputs:] for part in parts])
        if joined is None:
            continue
        rest = parts[0].args[inputs + len(joined) :]
        product = insert(parts[0], parts[0].target, (*parts[0].args[:inputs], *joined, *rest), cat.meta["val"])
        start = 0
        for part in parts:
            width = value_of(part).shape[-1]
            if any(user is not cat for user in part.users):
                with part.graph.inserting_after(product):
                    piece = part.graph.call_function(torch.ops.aten.slice.Tensor, (product, last, start, start + width))
                piece.meta["val"] = part.meta["val"]
                part.replace_all_uses_with(piece, delete_user_cb=lambda user, cat=cat: user is not cat)
            start += width
        cat.replace_all_uses_with(product)
        report.add(f"{joined[0].meta['weight']} {tuple(value_of(joined[0]).shape)}")
        finish(program)
    return report


def _same_input(parts: list[fx.Node]) -> bool:
    target = parts[0].target
    return target in PRODUCTS and all(
        part.target is target and part.args[: PRODUCTS[target]] == parts[0].args[: PRODUCTS[target]] for part in parts
    )


def _joined_weights(program: Program, arguments: list[tuple[Any, ...]]) -> list[fx.Node | None] | None:
    """Weights, scales and biases of several products as those of one, or None when they are not constants alike."""
    joined: list[fx.Node | None] = []
    for column in zip(*arguments, strict=True):
        if not all(node is None or isinstance(node, fx.Node) for node in column):
            break  # dtypes and switches, which follow
        if any(node is None for node in column):
            if any(node is not None for node in column):
                return None
            joined.append(None)
            continue
        if any(node.op != "get_attr" for node in column):
            return None
        name = f"{column[0].meta['weight']}+{len(column) - 1}"
        joined.append(weight_node(program, name, _cat([constant(program.module, node).detach() for node in column])))
    return joined


def fuse(program: Program) -> Report:
    """A residual sum and the norm behind it become one kernel: one read, two writes."""
    report = Report("fuse")
    for norm in calls(program, K.adaln.default, K.layer_norm.default):
        seam = _seam(norm)
        if seam is None:
            continue
        total, cast, stream = seam
        x, y, gate, rows = _summands(total)
        if norm.target is K.adaln.default:
            _, shift, scale, norm_rows, eps, _ = norm.args
            affine = False
        else:
            _, scale, shift, eps = norm.args
            affine, norm_rows = True, rows
        if scale is None or shift is None or (gate is not None and norm_rows is not rows):
            continue
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        late = [n for n in (shift, scale, norm_rows) if isinstance(n, fx.Node) and order[n] > order[total]]
        if late:
            continue
        dtypes = value_of(stream).dtype, value_of(norm.args[0]).dtype, value_of(norm).dtype
        args = (x, y, gate, shift, scale, norm_rows, eps, affine, *dtypes)
        made, h = outputs(total, K.residual_norm.default, args, like(stream), like(norm))
        norm.replace_all_uses_with(h)
        stream.replace_all_uses_with(made)
        report.add(f"{total.name} + {norm.name}{' + ' + cast.name if cast else ''}")
        finish(program)
    return report


def _seam(norm: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node] | None:
    """The residual sum that `norm` reads, the cast between them, and which of both goes on as the stream."""
    source = norm.args[0]
    cast = source if source.target is TO else None
    total = source if cast is None else cast.args[0]
    if not isinstance(total, fx.Node) or total.target not in SUMS or not _is_residual(total):
        return None
    if cast is None:
        return total, None, total
    if len(total.users) == 1:
        return total, cast, cast  # the cast is what goes on
    return (total, cast, total) if len(cast.users) == 1 else None


SUMS = (K.gated_residual.default, torch.ops.aten.add.Tensor, K.audio_residual.default)


def _is_residual(total: fx.Node) -> bool:
    x, y = total.args[:2]
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)) or len(value_of(total).shape) != 3:
        return False
    if total.target is K.audio_residual.default and total.args[2] is not None:
        return False  # several actors: their masks are the op's own business
    return value_of(x).shape == value_of(y).shape == value_of(total).shape


def _summands(total: fx.Node) -> tuple[Any, Any, Any, Any]:
    """x, y, gate, rows of a residual sum."""
    gated = total.target is K.gated_residual.default
    return (*total.args[:2], *total.args[2:4]) if gated else (*total.args[:2], None, None)


def quantise(program: Program, ignore: tuple[str, ...], packed: dict[str, tuple[Tensor, Tensor]]) -> Report:
    """Linear layers multiply in e4m3, with a scale a token and an output channel.

    Layers whose weight's name contains one of `ignore`, or whose sides are not multiples of 16, stay as they are.
    `packed` keeps the quantised weights by name, so that several programs share them.
    """
    report = Report("quantise")
    for node in calls(program, K.linear.default):
        x, weight, bias = node.args
        if weight.op != "get_attr" or value_of(node).dtype != torch.bfloat16:
            continue
        name = weight.meta["weight"]
        if any(part in name for part in ignore) or any(side % QUANTUM for side in value_of(weight).shape):
            continue
        if name not in packed:
            packed[name] = quantize_fp8(constant(program.module, weight).detach(), "row")
        weight8, descale = packed[name]
        constants = weight_node(program, f"{name}.e4m3", weight8), weight_node(program, f"{name}.descale", descale)
        x8 = outputs(node, K.quantize_rows.default, (x,), *_e4m3(x))
        made = insert(node, K.fp8_matmul.default, (*x8, *constants, bias, torch.bfloat16, True), node.meta["val"])
        node.replace_all_uses_with(made)
        report.add(f"{name} {tuple(weight8.shape)}: {_sqnr(constant(program.module, weight), weight8, descale):.1f} dB")
    finish(program)
    return report


def _sqnr(weight: Tensor, weight8: Tensor, descale: Tensor) -> float:
    """Signal to quantisation noise of a weight in dB; NaN without memory."""
    if weight.is_meta:
        return float("nan")
    noise = (weight8.float() * descale - weight.float()).square().mean()
    return float(10.0 * torch.log10(weight.float().square().mean() / noise.clamp(min=1e-30)))


def _e4m3(x: fx.Node) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `x` in e4m3 and of its descales."""
    return like(x, dtype=E4M3), like(x, *value_of(x).shape[:-1], 1, dtype=torch.float32)


def share(program: Program) -> Report:
    """A tensor that several FP8 products read is quantised once."""
    report = Report("share")
    first: dict[fx.Node, fx.Node] = {}
    for node in calls(program, K.quantize_rows.default):
        known = first.setdefault(node.args[0], node)
        if known is node:
            continue
        items = {item.args[1]: item for item in known.users}
        for item in list(node.users):
            item.replace_all_uses_with(items[item.args[1]])
        report.add(f"{node.args[0].name} quantised once")
    finish(program)
    return report


def emit(program: Program) -> Report:
    """A tensor that only FP8 products read is quantised by the kernel that makes it."""
    report = share(program)
    report.name = "emit"
    for node in calls(program, K.quantize_rows.default):
        x = node.args[0]
        made = _emitted(x) if list(x.users) == [node] else None
        if made is None:
            continue
        for item in list(node.users):
            item.replace_all_uses_with(made[item.args[1]])
        report.add(f"{x.name} leaves its kernel in e4m3")
    finish(program)
    return report


def _emitted(x: fx.Node) -> list[fx.Node] | None:
    """`x` in e4m3 and its descales, made by its own kernel; None where that cannot."""
    if value_of(x).dtype != torch.bfloat16:
        return None
    if x.target is torch.ops.aten.gelu.default and x.kwargs.get("approximate") == "tanh":
        return outputs(x, K.gelu_quantize_rows.default, (x.args[0],), *_e4m3(x))
    if x.target is K.adaln.default:
        return outputs(x, K.adaln_fp8.default, x.args[:5], *_e4m3(x))
    call = x.args[0] if x.target is operator.getitem else None
    if not isinstance(call, fx.Node) or call.target is not K.residual_norm.default or x.args[1] != 1:
        return None
    stream = next((user for user in call.users if user.args[1] == 0), None)
    goes_on, *made = outputs(
        call, K.residual_norm_fp8.default, call.args[:10], like(call.args[0], dtype=call.args[8]), *_e4m3(x)
    )
    if stream is not None:
        stream.replace_all_uses_with(goes_on)
    return made
