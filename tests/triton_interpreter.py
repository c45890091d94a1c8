"""Triton kernels in tests on a machine without a GPU.

Triton decides when a kernel is *decorated* whether its interpreter runs it, the ops decide when they are *called*
(`kernels.dispatch.interpreting`). So importing this file imports all kernels with TRITON_INTERPRET=1 and takes the
variable away again: every test, and every process that a test starts, then runs the plain references. The fixture
`kernel_device` gives the variable back for as long as a test runs.

The interpreter (3.6, 3.7) casts to bfloat16 by truncation, and its cast to FP8 loses the carry of a mantissa that
rounds up; `cast` rounds to nearest even and saturates FP8, as Hopper does, so that tests may compare bits.
"""

import importlib
import os
import pkgutil

os.environ["TRITON_INTERPRET"] = "1"

import kinora.kernels
import numpy as np
import torch
import triton.language as tl

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
