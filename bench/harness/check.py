"""Is a result right? Relative L2 error against a reference; a time is reported only for what passes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Check:
    """Relative L2 `error` of a result against its reference, at most `tolerance` when it is right."""

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN

    def __str__(self) -> str:
        return f"relative L2 error {self.error:.2e}, allowed {self.tolerance:.0e}"


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@torch.no_grad()
def relative_l2(actual: Any, expected: Any) -> float:
    """Largest ||a - e|| / ||e|| over the tensors of two equal structures; infinite when anything is not finite.

    ValueError when the numbers of tensors or their shapes differ.
    """
    ours, theirs = tensors(actual), tensors(expected)
    if [a.shape for a in ours] != [e.shape for e in theirs]:
        raise ValueError(f"results differ in shape: {_shapes(ours)} and, of the reference, {_shapes(theirs)}")
    return max((_relative(a, e) for a, e in zip(ours, theirs, strict=True)), default=0.0)


def _relative(actual: Tensor, expected: Tensor) -> float:
    a, e = (t.detach().to(expected.device).float() for t in (actual, expected))
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(e).all()):
        return float("inf")
    wrong, size = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (a - e, e))
    return wrong / size if size else (0.0 if not wrong else float("inf"))


def _shapes(found: Iterable[Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in found) or "nothing"
