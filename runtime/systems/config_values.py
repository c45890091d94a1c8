"""Configuration dataclasses <-> JSON: tuples as lists, enumerations by their value, dtypes by their name.

And where two such JSON values differ.
"""

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar, get_type_hints

import torch

T = TypeVar("T")
LONGEST_SHOWN = 60  # characters of a value in a message


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `kind` of JSON values; absent fields keep their defaults.

    Raises TypeError, ValueError or AttributeError for what is no value of it.
    """
    hints = get_type_hints(kind)
    return kind(**{name: _typed(hints.get(name), value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def _typed(hint: Any, value: Any) -> Any:
    if hint is torch.dtype:
        found = getattr(torch, value)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{value!r} is no dtype")
        return found
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return tuple(value) if isinstance(value, list) else value


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Every field in which two JSON values differ: "mode.steps is 5, not 4". 1, 1.0 and true are three values."""
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return [f"{name} has {len(ours)} entries, not {len(theirs)}"]
        ours, theirs = ({str(i): value for i, value in enumerate(values)} for values in (ours, theirs))
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        found = []
        for key in dict.fromkeys((*theirs, *ours)):
            inner = f"{name}.{ascii(key)[1:-1]}".removeprefix(".")
            if key not in ours:
                found.append(f"{inner} is missing")
            elif key not in theirs:
                found.append(f"{inner} is too much")
            else:
                found += differences(ours[key], theirs[key], inner)
        return found
    left, right = (json.dumps(value, sort_keys=True) for value in (ours, theirs))
    return [] if left == right else [f"{name} is {_shortened(left)}, not {_shortened(right)}"]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 4]} ..."
