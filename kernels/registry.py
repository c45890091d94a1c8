"""All ops of this folder: what generated tests and benchmarks walk over.

An op joins by standing at the top level of a module of `kernels/` as an `Op`: `OP = Op(...)`, and `FP8_OP = Op(...)` or
the like where a module has more than one. There is no list to keep.
"""

import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import MappingProxyType

from .cases import Op


@cache
def registry() -> MappingProxyType[str, Op]:
    """Name -> op, by name. ValueError when two ops have the same name."""
    found: dict[str, tuple[str, Op]] = {}
    for module, op in _declared():
        first, known = found.setdefault(op.name, (module, op))
        if known is not op:  # the same op twice was only imported
            raise ValueError(f"op {op.name!r} is declared by {first} and by {module}; rename one")
    return MappingProxyType({name: found[name][1] for name in sorted(found)})


def _declared() -> Iterator[tuple[str, Op]]:
    """(module name, op) of every op at the top level of a module in this folder."""
    folder = import_module(__package__ or "")
    for info in pkgutil.iter_modules(folder.__path__):
        module = import_module(f".{info.name}", __package__)
        for value in vars(module).values():
            if isinstance(value, Op):
                yield module.__name__, value
