"""What every test may rely on: no network, one thread a worker, the same random numbers each time.

Triton kernels without a GPU: Triton decides when a kernel is *decorated* whether its interpreter runs it, the ops
decide when they are *called* (`kernels.dispatch.interpreting`). So this file imports all kernels with
TRITON_INTERPRET=1 and takes the variable away again: every test, and every process that a test starts, then runs the
plain references. A test that asks for the fixture `kernel_device` has the variable back for as long as it runs.
"""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    import triton_interpreter  # imports the kernels for Triton's interpreter

settings.register_profile("same", derandomize=True)
settings.load_profile("same")


def pytest_configure() -> None:
    """Share the cores among the workers of pytest-xdist; alone, use them all."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, also for a GPU's convolutions


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, in whatever order they run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where Triton kernels run in this test: on the GPU compiled, or else on the CPU in Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton_interpreter.repair(monkeypatch)
    return torch.device("cpu")
