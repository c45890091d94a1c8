"""FP8 products by row scales: the library's against the persistent Triton kernel, over tiles; called by `rowwise`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import fp8_matmul
from ..kernels.fp8_gemm import GemmTile, fp8_gemm
from ..kernels.quantize_rows import quantize_fp8
from .harness.check import relative_l2

SHAPES = ((15360, 5120), (5120, 5120), (13824, 5120), (5120, 13824))  # (N, K) of LiveAvatar 14B
TILES = (
    GemmTile(128, 256, 128, 8, 3, 8),
    GemmTile(128, 256, 128, 8, 3, 16),
    GemmTile(128, 256, 128, 8, 3, 25),
    GemmTile(128, 256, 64, 8, 4, 8),
    GemmTile(256, 128, 128, 8, 3, 8),
    GemmTile(128, 128, 128, 8, 4, 8),
    GemmTile(128, 128, 128, 4, 4, 8),
    GemmTile(128, 128, 128, 4, 3, 16),
)
TOLERANCE = 1e-2


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device = torch.device("cuda")
    x8, descale = quantize_fp8(torch.randn(m, k, device=device), "row")
    weight8, weight_descale = quantize_fp8(torch.randn(n, k, device=device) * k**-0.5, "row")
    return x8, descale, weight8, weight_descale, torch.randn(n, device=device).to(torch.bfloat16)


def products_table(microseconds: Callable[..., float], tokens: int = 3168) -> int:
    """Check and time both at every shape; the number of failures."""
    failures = 0
    for n, k in SHAPES:
        sets = [operands(tokens, n, k) for _ in range(4)]
        expected = fp8_matmul.reference(*sets[0])
        subjects: dict[str, Callable[..., Any]] = {
            "_scaled_mm, fast": fp8_matmul.fp8_matmul,
            "_scaled_mm, float32 sums": partial(fp8_matmul.fp8_matmul, fast_accum=False),
        }
        subjects |= {f"triton {'x'.join(map(str, t))}": partial(fp8_gemm, tiling=t) for t in TILES}
        print(f"M {tokens}, N {n}, K {k}: us, TFLOP/s, error")
        for name, run in subjects.items():
            try:
                off = relative_l2(run(*sets[0]), expected)
                time = microseconds([partial(run, *given) for given in sets])
            except Exception as reason:  # one tile that does not fit must not end the table
                print(f"  {name:28s} {type(reason).__name__}: {str(reason).splitlines()[0][:80]}")
                continue
            failures += not off < TOLERANCE
            rate = 2 * tokens * n * k / time / 1e6
            print(f"  {name:28s} {time:8.1f} {rate:6.0f} {off:8.1e}{'' if off < TOLERANCE else '  FAILED'}", flush=True)
    return failures
