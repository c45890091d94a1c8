"""The limits of this machine, measured in the same run as everything else: matrix products and a device copy.

No call can be faster than max(its FLOPs / the best product, its bytes / the copy); a percentage of the roofline is
that time over the measured one. The limits are what a large call of a library reaches here, not the data sheet's peak.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...graphs.quantize import FP8_CAPABILITY
from .timing import Timer

Precision = Literal["float32", "bf16", "fp8"]
GPU_SIDE = 8192  # of the square matrices: large enough for the best rate, 1.1 TFLOP a product
CPU_SIDE = 512
GPU_COPY, CPU_COPY = 2**30, 2**26  # bytes read by one copy, as many are written


@dataclass(frozen=True)
class Roofline:
    """FLOP/s of a large product by precision, bytes/s (read + written) of a large copy."""

    flops_per_second: dict[str, float]
    bytes_per_second: float

    def seconds(self, flops: float, bytes_moved: float, precision: str) -> float | None:
        """The least time of a call, None when its precision was not measured or it has no known work."""
        best = self.flops_per_second.get(precision)
        if best is None or not (flops or bytes_moved):
            return None
        return max(flops / best, bytes_moved / self.bytes_per_second)


def measure(device: torch.device, run_seconds: float = 0.5) -> Roofline:
    """Time the limits on `device`: float32 on a CPU; bf16, and FP8 where the GPU multiplies it, on CUDA."""
    timer = Timer(device, run_seconds, queue_ahead=True)
    on_gpu = device.type == "cuda"
    side = GPU_SIDE if on_gpu else CPU_SIDE
    products: dict[str, Callable[[], object]] = {}
    if on_gpu:
        products["bf16"] = _product(torch.randn(2, side, side, device=device, dtype=torch.bfloat16))
        if torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
            products["fp8"] = _scaled_product(torch.randn(2, side, side, device=device))
    else:
        products["float32"] = _product(torch.randn(2, side, side))
    rates = {name: 2 * side**3 / timer([call]).seconds for name, call in products.items()}
    source = torch.randint(255, (GPU_COPY if on_gpu else CPU_COPY,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timer([lambda: target.copy_(source)]).seconds
    return Roofline(rates, 2 * source.numel() / seconds)


def _product(pair: Tensor) -> Callable[[], Tensor]:
    a, b = pair
    return lambda: a @ b.T


def _scaled_product(pair: Tensor) -> Callable[[], Tensor]:
    """e4m3 with one scale a row and a column, the product of FP8 linear layers."""
    scale = 448 / pair.abs().amax(-1, keepdim=True)  # [2, side, 1]
    a, b = (pair * scale).to(torch.float8_e4m3fn)
    rows, columns = 1 / scale
    return lambda: torch._scaled_mm(a, b.T, rows, columns.T, out_dtype=torch.bfloat16, use_fast_accum=True)
