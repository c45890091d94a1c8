"""Which function recomputes which golden case: handlers register themselves by system and file-name pattern."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from . import cases as case_package
from .case import Case

Handler = Callable[[Case], Mapping[str, Any]]
_HANDLERS: list[tuple[str, str, Handler]] = []


def handles(system: str, *patterns: str) -> Callable[[Handler], Handler]:
    """Register a handler for the cases of `system` whose name matches one of the patterns (`fnmatch`).

    A handler returns computed values by golden name: `out.*` and `mid.*` tensors, or `json.<dotted key>` values.
    ValueError for a pattern that has a handler, of which one would never run.
    """

    def register(handler: Handler) -> Handler:
        if taken := [p for s, p, _ in _HANDLERS if s == system and p in patterns]:
            raise ValueError(f"{system}: {taken[0]} has a handler already; delete one of the two")
        _HANDLERS.extend((system, pattern, handler) for pattern in patterns)
        return handler

    return register


def load_handlers() -> None:
    """Import every module of `cases/`, so that their handlers register."""
    for module in pkgutil.iter_modules(case_package.__path__):
        importlib.import_module(f"{case_package.__name__}.{module.name}")


def find_handler(case: Case) -> Handler | None:
    """The handler of the longest matching pattern (the most specific), or None."""
    found = [(len(p), h) for s, p, h in _HANDLERS if s == case.system and fnmatchcase(case.name, p)]
    return max(found, key=lambda item: item[0])[1] if found else None
