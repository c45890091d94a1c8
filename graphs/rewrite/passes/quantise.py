"""Linear layers in e4m3."""

import torch
from torch import Tensor

from ....kernels.quantize_rows import quantize_fp8
from ...quantize import QUANTUM
from ..nodes import E4M3, K, calls, finish, insert, like, operands, outputs, replace, weight_node
from ..program import Program, Report, constant, value_of


def quantise(program: Program, ignore: tuple[str, ...], packed: dict[str, tuple[Tensor, Tensor]]) -> Report:
    """Linear layers multiply in e4m3, with a scale a token and an output channel.

    Layers whose weight's name contains one of `ignore`, or whose sides are not multiples of 16, stay as they are, and
    so do those whose weight is no constant of the graph or not bfloat16. `packed` keeps the quantised weights by name,
    so that several programs share them.
    """
    report = Report("quantise")
    for node in calls(program, K.linear.default):
        x, weight, bias = operands(node)
        if weight.op != "get_attr" or value_of(node).dtype != torch.bfloat16:
            continue
        name, value = weight.meta["weight"], constant(program.module, weight).detach()
        if any(part in name for part in ignore) or any(side % QUANTUM for side in value.shape):
            continue
        if name not in packed:
            packed[name] = quantize_fp8(value, "row")
        weight8, descale = packed[name]
        constants = weight_node(program, f"{name}.e4m3", weight8), weight_node(program, f"{name}.descale", descale)
        values = like(x, dtype=E4M3), like(x, *value_of(x).shape[:-1], 1, dtype=torch.float32)
        x8 = outputs(node, K.quantize_rows.default, (x,), *values)
        made = insert(node, K.fp8_matmul.default, (*x8, *constants, bias, torch.bfloat16, True), node.meta["val"])
        report.add(f"{name} {tuple(weight8.shape)}: {_sqnr(value, weight8, descale)}", node)
        replace(program, node, made)
    finish(program)
    return report


def _sqnr(weight: Tensor, weight8: Tensor, descale: Tensor) -> str:
    """Signal to quantisation noise of a weight; unknown where it has no memory."""
    if weight.is_meta:
        return "noise unknown without weights"
    wide = weight.float()
    noise = (weight8.float() * descale - wide).square().mean()
    return f"{float(10.0 * torch.log10(wide.square().mean() / noise.clamp(min=1e-30))):.1f} dB"
