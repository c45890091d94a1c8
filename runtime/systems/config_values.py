"""Configuration dataclasses <-> JSON: tuples as lists, enumerations by their value, dtypes by their name."""

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar, get_type_hints

import torch

T = TypeVar("T")


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
