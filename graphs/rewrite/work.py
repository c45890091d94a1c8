"""How much a call does, and the least time that a GPU's ceilings allow for it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """What a GPU reaches at best: TFLOP/s of products in bfloat16 and e4m3, TB/s of its memory (H200, measured).

    Products in other dtypes are held to the bfloat16 ceiling, so that their time is a bound that they do not reach.
    """

    bf16: float = 700.0
    fp8: float = 1300.0
    memory: float = 4.3

    def __post_init__(self) -> None:
        if min(self.bf16, self.fp8, self.memory) <= 0:
            raise ValueError(f"{self}: every ceiling must be more than 0")


@dataclass(frozen=True)
class Work:
    """One call of a graph: its layer, FLOPs, bytes moved, and whether it multiplies in e4m3."""

    layer: str
    flops: float
    bytes: float
    fp8: bool

    def seconds(self, ceilings: Ceilings) -> float:
        peak = ceilings.fp8 if self.fp8 else ceilings.bf16
        return max(self.flops / (peak * 1e12), self.bytes / (ceilings.memory * 1e12))


@dataclass(frozen=True)
class Cost:
    """Several calls; `seconds`: the sum of their roofline times, for each runs alone."""

    calls: int
    flops: float
    bytes: float
    seconds: float

    @classmethod
    def of(cls, work: Iterable[Work], ceilings: Ceilings) -> "Cost":
        calls = list(work)
        return cls(
            len(calls),
            sum(call.flops for call in calls),
            sum(call.bytes for call in calls),
            sum(call.seconds(ceilings) for call in calls),
        )
