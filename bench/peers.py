"""What others offer for the same work, so that a number has something to stand beside.

For ops: cuDNN's attention and the scaled product of cuBLAS, on inputs that are already laid out as they like them.
For FP8 models: `ScaledLinear`, PyTorch's own product as anyone would write it, and torchao's `quantize_`. For a whole
step: diffusers' Wan.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..graphs.models.liveavatar import LiveAvatarConfig
from ..graphs.quantize import FP8_CAPABILITY, Fp8Linear, takes_fp8
from ..kernels.cases import Inputs
from .harness.run import Unavailable

HALF = (torch.bfloat16, torch.float16)
LEAST_MAXIMUM = 1e-12  # of a row that is quantised: torchao divides by it, and the audio's padding token is all zeros


def library_calls(op: str, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Variant name -> call, for the ops that a library has; none on a CPU."""
    if op == "rope_attention" and inputs["q"].is_cuda and inputs["q"].dtype in HALF and inputs.get("mask") is None:
        return _attention(inputs)
    if op == "fp8_linear" and inputs["x"].is_cuda:
        return _scaled_product(inputs)
    return {}


def _attention(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """The same keys in one tensor, already rotated: cuDNN neither joins segments nor rotates."""
    q, dtype = inputs["q"], inputs["q"].dtype
    lengths = inputs.get("lengths") or [None] * len(inputs["keys"])
    spans = [k.shape[1] if n is None else int(n) for k, n in zip(inputs["keys"], lengths, strict=True)]
    k, v = (
        torch.cat([part[:, :n].to(dtype) for part, n in zip(inputs[name], spans, strict=True)], 1).transpose(1, 2)
        for name in ("keys", "values")
    )
    q = q.transpose(1, 2)  # [B, H, L, d]

    def backend(kind: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    return {"cudnn": backend(SDPBackend.CUDNN_ATTENTION), "flash (torch)": backend(SDPBackend.FLASH_ATTENTION)}


def _scaled_product(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """The product alone, its input quantised beforehand."""
    x8, rows = quantize_rows(inputs["x"].flatten(0, -2))
    weight8 = inputs["weight8"]
    columns = inputs["weight_descale"].reshape(1, -1).expand(1, weight8.shape[0]).contiguous()
    return {"_scaled_mm": lambda: scaled_product(x8, rows, weight8, columns, None)}


def scaled_product(x8: Tensor, rows: Tensor, weight8: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """e4m3 x8 [M, K] with factors [M, 1], weight8 [N, K] with factors [1, N], bias [N] -> bf16 [M, N]; CUDA only."""
    return torch._scaled_mm(x8, weight8.t(), rows, columns, bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (e4m3fn [M, K], factor float32 [M, 1] that restores it)."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=LEAST_MAXIMUM)
    return (x.float() * (448.0 / largest)).to(torch.float8_e4m3fn), largest / 448.0


class ScaledLinear(nn.Module):
    """An `Fp8Linear` with row scales as plain PyTorch: quantise the rows, then `torch._scaled_mm`. CUDA only."""

    def __init__(self, linear: Fp8Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # shared, not copied
        self.columns = linear.weight_descale.reshape(1, -1)
        self.dtype = linear.dtype

    def forward(self, x: Tensor) -> Tensor:
        x8, rows = quantize_rows(x.to(self.dtype).flatten(0, -2))
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return scaled_product(x8, rows, self.weight, self.columns, bias).to(self.dtype).unflatten(0, x.shape[:-1])


def quantize_by_torchao(model: nn.Module) -> None:
    """torchao's FP8, in place, in the layers that our recipe quantises: a scale a row of the input and of the weight.

    Unavailable without torchao, and on a device whose FP8 torchao does not use.
    """
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise Unavailable(f"torchao is not installed ({error})") from error
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise Unavailable("torchao multiplies FP8 on a GPU of compute capability 8.9 or later only")
    quantize_(model, torchao_fp8(), filter_fn=takes_fp8)


def torchao_fp8() -> Any:
    """torchao's recipe: rows of zeros stay zeros, and the compiler's settings for what is measured after it as well."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), activation_value_lb=LEAST_MAXIMUM, set_inductor_config=False
    )


def diffusers_wan(config: LiveAvatarConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """diffusers' WanTransformer3DModel of the same width, depth and patch, with random weights.

    It has no audio layers, no rolling cache and no condition tokens: at the same number of tokens it does less.
    Unavailable without diffusers.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise Unavailable(f"diffusers is not installed ({error})") from error
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made: Any = WanTransformer3DModel(
                patch_size=config.patch,
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                in_channels=config.in_dim,
                out_channels=config.out_dim,
                text_dim=config.text_dim,
                freq_dim=config.freq_dim,
                ffn_dim=config.ffn_dim,
                num_layers=config.num_layers,
                eps=config.eps,
            )
    finally:
        torch.set_default_dtype(before)
    return made.eval()
