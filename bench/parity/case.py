"""One golden case: its .json, its tensors, and where its weights lie."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

SYSTEMS = ("wan", "liveavatar", "omniavatar", "stableavatar", "skyreels_v3", "latentsync")


@dataclass
class Case:
    """`<name>.json` with, mostly, `<name>.safetensors` beside it (golden/README.md)."""

    system: str
    path: Path
    consumed: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def json(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        file = self.path.with_suffix(".safetensors")
        return load_file(file) if file.is_file() else {}

    def __getitem__(self, name: str) -> Tensor:
        """A recorded tensor used as an input; a `mid.*` read here needs no computed counterpart."""
        self.consumed.add(name)
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"{self.path.stem}: no tensor {name!r}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def names(self, prefix: str) -> list[str]:
        """Recorded tensor names that start with `prefix`, in file order."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def sibling(self, file: str) -> "Case":
        """The case that holds weights or configuration for this one; `file` with or without an ending."""
        return Case(self.system, self.path.parent / f"{Path(file).stem}.json")

    def weights(self, file: str | None = None, prefix: str = "") -> dict[str, Tensor]:
        """The `w.<prefix>*` tensors with that prefix removed, from this case or from the file it names.

        `file` None follows the keys `weights_file` / `weights` of the .json when this case has no weights itself.
        """
        own = any(name.startswith("w.") for name in self.tensors)
        named = file or (None if own else self.json.get("weights_file") or self.json.get("weights"))
        source = self.sibling(named).tensors if named else self.tensors
        start = f"w.{prefix}"
        found = {name[len(start) :]: value for name, value in source.items() if name.startswith(start)}
        if not found:
            raise KeyError(f"{self.name}: no weights under {start!r} in {named or self.path.name}")
        return found


def system_of(folder: Path) -> str:
    """The system that the nearest folder of the path names as a word (`wan`, `golden_wan`, `wan-2`), else "?"."""
    for part in reversed(folder.parts):
        for system in SYSTEMS:
            if re.search(rf"(?<![a-z0-9]){system}(?![a-z0-9])", part.lower()):
                return system
    return "?"


def find_cases(folder: Path) -> list[Case]:
    """Every golden .json below `folder`, by the system that its folder names and by file name."""
    return [Case(system_of(path.parent), path) for path in sorted(folder.resolve().rglob("*.json"))]
