"""A persistent Triton product of FP8 operands, to be measured against the library's in `fp8_matmul`.

    y = bf16((x8 * descale) @ (weight8 * weight_descale).T + bias)

Shapes: x8 [M, K], weight8 [N, K] e4m3fn, K a multiple of 16; descale [M, 1], weight_descale [N, 1] float32; bias [N];
result bfloat16 [M, N]. One program a multiprocessor walks the tiles of the result in an order that reuses rows of x8
and weight8 from the L2 cache; the copy engine (TMA) loads the tiles. Partial sums stay in the tensor cores' precision
inside a tile of K, as with `fast_accum`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class GemmTile(NamedTuple):
    """Tile of the result, its depth in K, and how a program is run."""

    m: int = 128
    n: int = 256
    k: int = 128
    num_warps: int = 8
    num_stages: int = 3
    group: int = 8  # rows of tiles that are walked together


@triton.jit
def _product(
    x8,  # descriptor of [M, K]
    weight8,  # descriptor of [N, K]
    descale,  # [M]
    weight_descale,  # [N]
    bias,  # [N] or None
    out,  # [M, N]
    m,
    n,
    k,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    down = tl.cdiv(m, BLOCK_M)
    across = tl.cdiv(n, BLOCK_N)
    deep = tl.cdiv(k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        group = tile // (GROUP * across)
        height = tl.minimum(down - group * GROUP, GROUP)
        within = tile % (GROUP * across)
        top = (group * GROUP + within % height) * BLOCK_M
        left = within // height * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(deep):
            a = x8.load([top, step * BLOCK_K])
            b = weight8.load([left, step * BLOCK_K])
            total = tl.dot(a, b.T, total)
        rows = top + tl.arange(0, BLOCK_M)
        cols = left + tl.arange(0, BLOCK_N)
        row_scale = tl.load(descale + rows, mask=rows < m, other=0.0)
        col_scale = tl.load(weight_descale + cols, mask=cols < n, other=0.0)
        y = total * row_scale[:, None] * col_scale[None, :]
        if bias is not None:
            y += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
        at = rows[:, None].to(tl.int64) * n + cols[None, :]
        tl.store(out + at, y.to(tl.bfloat16), mask=(rows < m)[:, None] & (cols < n)[None, :])


def fp8_gemm(
    x8: Tensor,
    descale: Tensor,
    weight8: Tensor,
    weight_descale: Tensor,
    bias: Tensor | None = None,
    tiling: GemmTile | None = None,
) -> Tensor:
    """[M, N] bfloat16; see the module docstring."""
    tiling = tiling or GemmTile()
    (m, k), n = x8.shape, weight8.shape[0]
    out = torch.empty((m, n), dtype=torch.bfloat16, device=x8.device)
    programs = triton.cdiv(m, tiling.m) * triton.cdiv(n, tiling.n)
    if x8.is_cuda:
        programs = min(programs, torch.cuda.get_device_properties(x8.device).multi_processor_count)
    _product[(programs,)](
        TensorDescriptor.from_tensor(x8, [tiling.m, tiling.k]),
        TensorDescriptor.from_tensor(weight8, [tiling.n, tiling.k]),
        descale,
        weight_descale,
        bias,
        out,
        m,
        n,
        k,
        PROGRAMS=programs,
        BLOCK_M=tiling.m,
        BLOCK_N=tiling.n,
        BLOCK_K=tiling.k,
        GROUP=tiling.group,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out
