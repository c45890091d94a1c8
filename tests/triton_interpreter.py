"""Repairs of Triton's interpreter (3.7.1), so that half-precision and FP8 kernels can be tested without a GPU.

As shipped it multiplies the bit patterns of bfloat16 operands in `tl.dot`, truncates casts to bfloat16, and loses the
carry when a cast to FP8 rounds up to the next power of two. Here PyTorch's own casts take their place.
"""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, _: Any) -> np.ndarray:
    """The bit patterns of `data` after a cast that rounds to nearest even."""
    values = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy()).view(TORCH[source])
    moved = values.to(TORCH[target])
    return moved.view(torch.uint8).numpy().view(BITS[moved.element_size()]).reshape(data.shape)


def as_float(handle: Any) -> np.ndarray:
    scalar = handle.dtype.scalar
    return convert(handle.data, scalar, tl.float32, None).view(np.float32)


def dot(_: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    return interpreter.TensorHandle(np.matmul(as_float(a), as_float(b)) + d.data, d.dtype.scalar)


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter for one test; nothing to do where kernels are compiled."""
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
