"""How the tables are written: name patterns and what lies below them.

A pattern names several tensors: `<q,k,v>` stands for each of its words, `<0-39>` for each number. What lies below a
pattern is `linear`, `conv`, `norm`, ... : endings with their shapes.
"""

import itertools
import re
from collections.abc import Mapping

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Layer = dict[str, Shape]

CHOICE = re.compile(r"<([^<>]*)>")


def linear(outputs: int, inputs: int, bias: bool = True) -> Layer:
    """Weight [outputs, inputs] and bias."""
    return conv(outputs, inputs, bias=bias)


def conv(outputs: int, inputs: int, *kernel: int, bias: bool = True) -> Layer:
    """Weight [outputs, inputs, *kernel] and bias."""
    return {".weight": (outputs, inputs, *kernel)} | ({".bias": (outputs,)} if bias else {})


def norm(width: int) -> Layer:
    """Weight and bias of a norm with both."""
    return {".weight": (width,), ".bias": (width,)}


def scale(width: int) -> Layer:
    """The weight of a norm that has no bias."""
    return {".weight": (width,)}


def tensor(*shape: int) -> Layer:
    """The pattern is the whole name."""
    return {"": shape}


def batch_norm(width: int) -> Layer:
    """Weight, bias, running statistics and their count."""
    return norm(width) | {".running_mean": (width,), ".running_var": (width,), ".num_batches_tracked": ()}


def _choices(text: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d+)-(\d+)", text):
        return [str(number) for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    return text.split(",")


def names(pattern: str) -> list[str]:
    """Every name that a pattern stands for."""
    parts = CHOICE.split(pattern)  # text, choice, text, choice, ..., text
    options = [_choices(part) if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*options)]


def expand(table: Mapping[str, Layer]) -> Shapes:
    """Name -> shape of a table; ValueError when two rows give the same name."""
    found: Shapes = {}
    for pattern, layer in table.items():
        for name in names(pattern):
            for ending, shape in layer.items():
                if f"{name}{ending}" in found:
                    raise ValueError(f"the table has {name}{ending} twice; the second row is {pattern!r}")
                found[f"{name}{ending}"] = shape
    return found


def below(prefix: str, table: Mapping[str, Layer]) -> dict[str, Layer]:
    """The same table under a prefix."""
    return {f"{prefix}{pattern}": layer for pattern, layer in table.items()}
