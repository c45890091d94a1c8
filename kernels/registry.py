"""All ops of this folder: what generated tests and benchmarks walk over.

An op joins by being a module of `kernels/` with `OP = Op(...)`; there is no list to keep.
"""

import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import MappingProxyType

from .cases import Op


@cache
def registry() -> MappingProxyType[str, Op]:
    """Name -> op, by name. ValueError when two modules give the same name."""
    found: dict[str, tuple[str, Op]] = {}
    for module, op in _declared():
        if op.name in found:
            raise ValueError(f"op {op.name!r} is declared by {found[op.name][0]} and by {module}; rename one")
        found[op.name] = module, op
    return MappingProxyType({name: found[name][1] for name in sorted(found)})


def _declared() -> Iterator[tuple[str, Op]]:
    """(module name, op) of every module in this folder that declares one."""
    folder = import_module(__package__ or "")
    for info in pkgutil.iter_modules(folder.__path__):
        if info.name == __name__.rpartition(".")[2]:
            continue
        module = import_module(f".{info.name}", __package__)
        op = getattr(module, "OP", None)
        if op is None:
            continue
        if not isinstance(op, Op):
            raise ValueError(f"{module.__name__} declares OP = {op!r}, which is no kernels.cases.Op")
        yield module.__name__, op
