"""Compile the Triton kernels behind ops for a Hopper GPU (sm_90) on any machine: nothing is launched.

    python tests/compile_kernels.py OP ...

Runs the ops' cases with a driver that says it is such a GPU and compiles what would be launched, through ptxas; prints
a line a case, and leaves with 1 if one fails. The interpreter runs kernels without compiling them: what only a compiler
refuses, such as PTX in a kernel, shows here.
"""

import sys
from typing import Any

import torch
import triton
from kinora.kernels import dispatch
from kinora.kernels.cases import Case, Op
from kinora.kernels.registry import registry
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

NO_KERNEL = ("attention_joined",)  # cuDNN's alone: its reference would run here, over gigabytes of scores
LARGEST = 4e8  # bytes of a case; larger ones take longer to draw than to compile
compiled: dict[str, Any] = {}


class Hopper:
    """What Triton asks of a driver until a kernel is compiled."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


run = jit.JITFunction.run


def compile_only(self: jit.JITFunction, *arguments: Any, grid: Any, warmup: bool, **given: Any) -> Any:
    kernel = run(self, *arguments, grid=grid, warmup=True, **given)
    compiled[kernel.hash] = kernel
    return kernel


def check(op: Op, case: Case) -> bool:
    before = len(compiled)
    try:
        with torch.no_grad():
            op.run(**case.inputs(torch.device("cpu"), torch.Generator().manual_seed(0)))
    except Exception as error:
        print(f"FAIL {op.name}, {case.name}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return False
    print(f"ok {op.name}, {case.name}: {len(compiled) - before} new kernels", flush=True)
    return True


def main(names: list[str]) -> int:
    driver.set_active(Hopper())
    jit.JITFunction.run = compile_only
    ops = registry()
    for name, module in list(sys.modules.items()):  # modules hold the function by name
        if name.startswith("kinora.kernels") and hasattr(module, "triton_runs"):
            module.triton_runs = lambda *tensors: True
    dispatch.triton_runs = lambda *tensors: True
    chosen = [ops[name] for name in names or ops if name not in NO_KERNEL]
    cases = [(op, case) for op in chosen for case in op.cases() if case.small or case.bytes < LARGEST]
    failed = sum(not check(op, case) for op, case in cases)
    print(f"{len(compiled)} kernels for sm_90, Triton {triton.__version__}")
    return 1 if failed or not compiled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
