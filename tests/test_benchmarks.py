"""Micro-benchmarks of every op on its own `cases()`, through pytest-benchmark; as a test each runs once.

    pytest -n 0 tests/test_benchmarks.py --benchmark-enable

On a CPU the small cases, on a GPU the real ones: replays of a CUDA graph, until they are done. A case whose result is
wrong fails and is not timed. `kinora bench op` has fresh inputs, rates and limits; this one has pytest's comparisons.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kinora.bench.ops import check_case
from kinora.graphs.capture import record
from kinora.kernels.cases import Case, Op
from kinora.kernels.dispatch import using
from kinora.kernels.registry import registry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in registry().values()
    for case in op.cases()
    if case.small != ON_GPU
]
WAYS = ["kinora", "reference"] if ON_GPU else ["kinora"]  # without Triton the op is its reference


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call until its work is done; on a GPU a replay of a graph that holds it."""
    if not ON_GPU:
        return call
    graph = record(call, DEVICE)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("op", "case"), CASES)
@torch.no_grad()
def test_op(op: Op, case: Case, way: str, benchmark: Any) -> None:
    benchmark.group = f"{op.name}: {case.name}"
    benchmark.extra_info |= {"flops": case.flops, "bytes": case.bytes}
    if way == "kinora":
        found = check_case(op, case, DEVICE)
        assert found.passed, found
    inputs = case.inputs(DEVICE, torch.Generator().manual_seed(0))
    with using(False) if way == "reference" else using(ON_GPU):
        try:
            call = finished(partial(op.run if way == "kinora" else op.reference, **inputs))
        except RuntimeError as error:
            if way == "kinora":
                raise
            pytest.skip(f"the reference reads the device from the host, which a graph cannot hold: {error}")
        benchmark(call)
