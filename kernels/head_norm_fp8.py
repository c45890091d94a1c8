"""`head_norm` in e4m3, for the queries of a cross attention whose keys are e4m3 too (`attention_joined`).

    q8 = e4m3(scale * heads(rms(x, weight)))

Shapes: x [B, L, D] (rows may be strided); weight [D]; scale float32 [H], of each head (`kv_cache.static_scales` cannot
overflow). Result [B, L, H, d].
Dtypes: statistics in float32; rounds to the dtype of x before the weight, to their promoted dtype after it, then to
e4m3.
Non-finite values: a NaN or Inf makes its own token NaN, and no other. Inference only.
Errors: ValueError when D does not split into `num_heads` of a size that the kernel knows, or a weight or scale does not
fit.
Source: as `qk_norm_rope`.
"""

import torch
from torch import Tensor

from .cases import Case, Op, randn
from .dispatch import triton_runs
from .kv_cache import E4M3, quantize_heads, static_scales
from .qk_norm_rope import check_projection, head_norm_reference
from .qk_rows import HEAD_DIMS, Part, prepare_rows


def reference(x: Tensor, weight: Tensor, scale: Tensor, num_heads: int, eps: float = 1e-6) -> Tensor:
    return quantize_heads(head_norm_reference(x, weight, None, num_heads, eps, torch.float32), scale)


def head_norm_fp8(x: Tensor, weight: Tensor, scale: Tensor, num_heads: int, eps: float = 1e-6) -> Tensor:
    """One tensor [B, L, D], normed and split into heads in e4m3: [B, L, H, d]; see the module docstring."""
    check_projection(x, (weight,), None, num_heads)
    if x.shape[-1] // num_heads not in HEAD_DIMS:
        raise ValueError(f"heads of {x.shape[-1] // num_heads} channels; e4m3 queries need one of {HEAD_DIMS}")
    if scale.shape != (num_heads,) or scale.dtype != torch.float32:
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}; it must be float32 [{num_heads}]")
    return torch.ops.kinora.head_norm_fp8(x, weight, scale, num_heads, eps)


@torch.library.custom_op("kinora::head_norm_fp8", mutates_args=())
def _head_norm_fp8_op(x: Tensor, weight: Tensor, scale: Tensor, num_heads: int, eps: float) -> Tensor:
    if not triton_runs(x, weight, scale):
        return reference(x, weight, scale, num_heads, eps).contiguous()
    out = _empty(x, num_heads)
    prepare_rows([Part(x, out, weight, scale=scale)], num_heads, eps=eps)
    return out


@_head_norm_fp8_op.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, num_heads: int, eps: float) -> Tensor:
    return _empty(x, num_heads)


def _empty(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, dim = x.shape
    return x.new_empty((batch, tokens, num_heads, dim // num_heads), dtype=E4M3)


def _case(
    name: str, tokens: int, heads: int, head_dim: int, *, batch: int = 1, small: bool = True, columns: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    """`columns`: x is the first of so many that a product made side by side."""
    dim = heads * head_dim

    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        x = randn(batch, tokens, columns * dim, device=device, generator=generator, dtype=dtype)[..., :dim]
        weight = randn(dim, device=device, generator=generator, dtype=dtype)
        return {"x": x, "weight": weight, "scale": static_scales(weight, heads), "num_heads": heads}

    moved = 0 if small else 3 * batch * tokens * dim
    return Case(name, inputs, 0, moved, small, tolerance=5e-2)  # to a neighbour in e4m3


def cases() -> list[Case]:
    """Text queries of LiveAvatar 14B, of one block and of four in a batch; awkward sizes."""
    return [
        _case("liveavatar-14b", 3168, 40, 128, small=False),
        _case("liveavatar-14b, four blocks", 12672, 40, 128, small=False),
        _case("columns of a product", 7, 3, 32, batch=2, columns=3),
        _case("one token, float32", 1, 5, 64, dtype=torch.float32),
        _case("heads that fill no piece", 5, 11, 16),
    ]


OP = Op("head_norm_fp8", head_norm_fp8, reference, cases, differentiable=False)
