"""Triton kernels in tests on a machine without a GPU.

Triton decides when a kernel is *decorated* whether its interpreter runs it, the ops decide when they are *called*
(`kernels.dispatch.interpreting`). So importing this file imports all kernels with TRITON_INTERPRET=1 and takes the
variable away again: every test, and every process that a test starts, then runs the plain references. The fixture
`kernel_device` gives the variable back for as long as a test runs.

The interpreter (3.6, 3.7) casts to bfloat16 by truncation, its cast to FP8 loses the carry of a mantissa that rounds
up, and its `tl.dot` multiplies the bit patterns of bfloat16. `cast` rounds to nearest even and saturates FP8, as Hopper
does, and `dot` multiplies values, so that tests may compare bits; `repair` puts both in place for one test.
"""

import importlib
import os
import pkgutil
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import kinora.kernels
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

for module in pkgutil.iter_modules(kinora.kernels.__path__):
    importlib.import_module(f"kinora.kernels.{module.name}")
del os.environ["TRITON_INTERPRET"]

DTYPES = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}


def cast(values: np.ndarray, source: tl.dtype, target: tl.dtype, _rounding: object) -> np.ndarray:
    """Bits of `values` (of dtype `source`, in any numpy type of that width) as `target`, in an unsigned numpy type."""
    wide = torch.frombuffer(bytearray(values.tobytes()), dtype=DTYPES[source])
    if target.is_fp8():
        limit = torch.finfo(DTYPES[target]).max
        wide = wide.float().clamp(-limit, limit)
    bits = wide.to(DTYPES[target]).view(torch.uint8).numpy()
    return bits.view(f"u{target.primitive_bitwidth // 8}").reshape(values.shape)


def dot(_builder: Any, a: Any, b: Any, accumulator: Any, _precision: Any, _imprecise: Any) -> Any:
    """a @ b + accumulator of the values, in float32."""
    wide = [cast(t.data, t.dtype.scalar, tl.float32, None).view(np.float32) for t in (a, b)]
    return interpreter.TensorHandle(np.matmul(*wide) + accumulator.data, accumulator.dtype.scalar)


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter for as long as a test runs."""
    monkeypatch.setattr(interpreter, "_convert_float", cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
