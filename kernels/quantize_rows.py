"""FP8 quantisation of activations: e4m3 values and float32 scales, alone or after the feed-forward's GELU.

    s = 448 / max(amax |x|, 1e-12);  x8 = e4m3(clamp(x * s, +-448));  descale = 1 / s

`quantize_rows(x)`: one scale a row of x [..., K] -> (e4m3fn [..., K], descale float32 [..., 1]).
`gelu_quantize_rows(x)`: the same of GELU (tanh form) of x, rounded to the dtype of x first.
`quantize_fp8(x, granularity)`: "row" as above; "tensor": one scale for all, descale [1], the scale capped at 448 as
published (so tensors with amax < 1 do not use the full range; liveavatar.md, 5.4).
Dtypes: x float32, bfloat16 or float16; everything in float32 inside.
A row of zeros gives zeros and a finite descale. A NaN gives its row the descale NaN, an infinity the descale infinity
and NaN where it stood: either makes the row's products NaN and touches no other row.
Not differentiable.  Errors: ValueError for an unknown granularity.
"""

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .cases import Case, Op, randn
from .dispatch import fused, triton_runs
from .launch import launched
from .rows import Tile, gelu_tanh, rounded, row_major, store_fp8, stream_piece, tile, triton_dtype

Granularity = Literal["tensor", "row"]
FP8_MAX = 448.0
AMAX_FLOOR = 1e-12
SCALE_CAP = 448.0


@triton.jit
def _quantize(
    x,  # [M, K]
    x8,  # [M, K]
    descale,  # [M, 1]
    x_row,
    GELU: tl.constexpr,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = tl.tuple(())
    for i in tl.static_range(PIECES):
        v = stream_piece(x + row * x_row, i, DIM, BLOCK)
        if GELU:
            v = rounded(gelu_tanh(v), DTYPE)
        values += (v,)
    store_fp8(x8 + row * DIM, descale + row, values, DIM, PIECES, BLOCK)


def launch(x: Tensor, gelu: bool, tiling: Tile | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (e4m3fn [..., K], descale [..., 1]) in Triton."""
    dim = x.shape[-1]
    flat = row_major(x.reshape(-1, dim))
    x8 = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    descale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    tiling = tiling or tile(dim)
    if flat.shape[0]:
        launched(_quantize)[(flat.shape[0],)](
            flat,
            x8,
            descale,
            flat.stride(0),
            GELU=gelu,
            DTYPE=triton_dtype(x.dtype),
            DIM=dim,
            PIECES=tiling.pieces(dim),
            BLOCK=tiling.block,
            num_warps=tiling.num_warps,
        )
    return x8, descale


def quantize_fp8(x: Tensor, granularity: Granularity = "tensor") -> tuple[Tensor, Tensor]:
    """x [..., K] -> (e4m3fn [..., K], descale float32 [1] or [..., 1]) in plain PyTorch: the reference."""
    wide = x.float()
    if granularity == "tensor":
        amax = wide.abs().amax().reshape(1)
        scale = (FP8_MAX / amax.clamp(min=AMAX_FLOOR)).clamp(max=SCALE_CAP)
    elif granularity == "row":
        scale = FP8_MAX / wide.abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
    else:
        raise ValueError(f"granularity {granularity!r} is not known; use 'tensor' or 'row'")
    return (wide * scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), 1.0 / scale


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_fp8(x, "row")


def gelu_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_fp8(F.gelu(x, approximate="tanh"), "row")


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    descale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), descale


@torch.library.custom_op("kinora::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if triton_runs(x):
        return launch(x, gelu=False)
    x8, descale = reference(x)
    return x8.contiguous(), descale.contiguous()


@torch.library.custom_op("kinora::gelu_quantize_rows", mutates_args=())
def _gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if triton_runs(x):
        return launch(x, gelu=True)
    x8, descale = gelu_reference(x)
    return x8.contiguous(), descale.contiguous()


_quantize_rows.register_fake(_fake)
_gelu_quantize_rows.register_fake(_fake)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as FP8 with one scale a row; see the module docstring."""
    return _quantize_rows(x) if fused(x) else reference(x)


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU (tanh form) of x [..., K] as FP8 with one scale a row; see the module docstring."""
    return _gelu_quantize_rows(x) if fused(x) else gelu_reference(x)


def _case(
    name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, small: bool = False, tolerance: float = 1e-2
) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": randn(*shape, device=device, generator=generator, dtype=dtype)}

    count = torch.Size(shape).numel()
    cost = 0 if small else count * (dtype.itemsize + 1) + count // shape[-1] * 4
    return Case(name, inputs, flops=0 if small else 3 * count, bytes=cost, small=small, tolerance=tolerance)


def _small(tolerance: float = 1e-2) -> list[Case]:
    return [
        _case("one token", 1, 1, 64, small=True, tolerance=tolerance),
        _case("tail", 2, 3, 300, small=True, tolerance=tolerance),
        _case("float32", 5, 100, dtype=torch.float32, small=True, tolerance=tolerance),
    ]


def cases() -> list[Case]:
    """LiveAvatar 14B at 704x384: attention output, audio tokens; awkward ones."""
    return [_case("attention output", 1, 3168, 5120), _case("audio tokens", 3, 5, 5120), *_small()]


def gelu_cases() -> list[Case]:
    """LiveAvatar 14B at 704x384: the middle of the feed-forward; awkward ones.

    GELU rounds to bfloat16 first, so some values fall on the other side of a tie of e4m3 than in float32.
    """
    return [_case("feed-forward", 1, 3168, 13824, tolerance=5e-2), *_small(tolerance=5e-2)]


OP = Op("quantize_rows", quantize_rows, reference, cases, differentiable=False)
GELU_OP = Op("gelu_quantize_rows", gelu_quantize_rows, gelu_reference, gelu_cases, differentiable=False)
