"""What an op says of itself, so that its tests and benchmarks need not be written by hand.

Every op is an `Op` at the top level of its module, where `registry()` finds it, with `cases()`: the real shapes of real
models, and small awkward ones (tails, one token, non-contiguous input) that the Triton interpreter can run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Inputs = Mapping[str, Any]
"""Keyword arguments of an op's public function."""


@dataclass(frozen=True)
class Case:
    """One call of an op.

    `inputs(device, generator)`: fresh random arguments (the generator lives on the CPU). `flops`, `bytes`: the
    arithmetic it must do and the fewest bytes through device memory (each input read once, each output written once);
    0 for small cases. `small`: for tests, not for benchmarks. `tolerance`: relative L2 error allowed against the
    reference in float32.
    """

    name: str
    inputs: Callable[[torch.device, torch.Generator], Inputs]
    flops: int = 0
    bytes: int = 0
    small: bool = False
    tolerance: float = 1e-2


@dataclass(frozen=True)
class Op:
    """A semantic operation: `run` is the public function, `reference` the plain one with the same arguments.

    Both return a tensor or a tuple of tensors; tensors named in `mutates` are arguments that they write.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    cases: Callable[[], Sequence[Case]]
    mutates: tuple[str, ...] = ()
    differentiable: bool = True


def randn(
    *shape: int,
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> torch.Tensor:
    """Normal random values drawn on the CPU, so that a case has the same values everywhere."""
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)
