"""Is a result right? Relative L2 error against a reference; a time is reported only for what passes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN meanwhile, so that what a kernel fails to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def in_float32(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same call with every tensor, and every dtype that it names, in float32."""
    wide = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.float()
        wide[name] = torch.float32 if isinstance(value, torch.dtype) else value
    return wide


def gradients(run: Callable[..., Any], inputs: Mapping[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a random projection of all results, the same for one seed, for every floating-point argument."""
    leaves = {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    generator = torch.Generator().manual_seed(seed)
    results = tensors(run(**leaves))
    weights = [torch.randn(result.shape, generator=generator).to(result.device) for result in results]
    total = torch.stack([(r.float() * w).sum() for r, w in zip(results, weights, strict=True)]).sum()
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


def _relative(actual: Tensor, expected: Tensor) -> float:
    a, e = (t.detach().to(expected.device).float() for t in (actual, expected))
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(e).all()):
        return float("inf")
    wrong, size = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (a - e, e))
    return wrong / size if size else (0.0 if not wrong else float("inf"))


def _shapes(found: Iterable[Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in found) or "nothing"
