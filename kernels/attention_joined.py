"""Attention over an FP8 cache in one buffer with one scale a tensor, by cuDNN (extra `gpu`); see `attention_cudnn`.

    O = softmax(q K^T / sqrt(d)) V over the first `length` rows,   q = q8 / scale_q, K = k8 / scale_k, V = v8 / scale_v
    result: O in bfloat16, or e4m3(scale_o O) with 1 / scale_o for each row (`attention_joined_fp8`)

Shapes: q8 [B, Lq, H, d], k8 and v8 [B, L, H, d] e4m3, `length` int32 [1] on the device, `scales` float32 [7]
(`joined_scales`). Result [B, Lq, H, d]; descale float32 [B, Lq, 1].
Dtypes: both products accumulate in float32, softmax in float32; the weights round to e4m3 (times 448, against the
maximum), and so does the result, also where it is returned in bfloat16: Hopper's cuDNN has no other.
Error: relative L2 on uncorrelated normal data, 15,312 keys of d = 128: 6.0e-2 (`attention_fp8`: 5.3e-2). e4m3 has the
same relative precision over fifteen octaves, so one scale a tensor costs nothing until heads differ by hundreds.
Non-finite values: rows beyond `length` must be finite. Inference only.
Errors: ValueError when shapes do not fit; RuntimeError on a GPU without the library, and from it for a single query.
"""

import torch
from torch import Tensor

from . import attention_cudnn, attention_table
from .cases import Case, Op, randn
from .kv_cache import E4M3, quantize_heads
from .qk_rows import HEAD_DIMS

WEIGHT_SCALE = 448.0


def joined_scales(scale_q: Tensor, scale_k: Tensor, scale_v: Tensor, scale_o: Tensor) -> Tensor:
    """Float32 [7] of four one-element scales: descales of q, K, V and of the weights, scale of the weights, of the
    result, and its descale."""
    scales = torch.cat([scale.reshape(1) for scale in (scale_q, scale_k, scale_v, scale_o)]).float()
    descales, one = 1 / scales, scales[:1]
    weights = torch.full_like(one, 1 / WEIGHT_SCALE), torch.full_like(one, WEIGHT_SCALE)
    return torch.cat((descales[:3], *weights, scales[3:], descales[3:]))


def available(device: torch.device) -> bool:
    """Whether the library is there for this device; on the CPU the reference always is."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device)[0] == 9 and attention_table.COUNTING in attention_table.available()


def fp8_reference(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The same roundings in plain PyTorch, except that weights round against the maximum over all keys at once."""
    rows = min(int(length), k8.shape[1])
    descale_q, descale_k, descale_v, _, _, scale_o, descale_o = scales.unbind()
    scores = torch.einsum("bqhd,bkhd->bhqk", q8.float(), k8[:, :rows].float())
    scores = scores * (descale_q * descale_k * q8.shape[3] ** -0.5)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (weights * WEIGHT_SCALE).to(E4M3).float() / WEIGHT_SCALE
    total = weights.sum(-1).transpose(1, 2)[..., None]  # [B, Lq, H, 1]
    out = torch.einsum("bhqk,bkhd->bqhd", rounded, v8[:, :rows].float()) * descale_v / total
    out8 = quantize_heads(out, scale_o.expand(q8.shape[2])).contiguous()
    return out8, _rows(descale_o, q8)


def _rows(descale: Tensor, q8: Tensor) -> Tensor:
    """One number for every row, [B, Lq, 1]; memory of its own, as results of an op must be."""
    return descale.expand(*q8.shape[:2], 1).clone(memory_format=torch.contiguous_format)


def reference(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    out8, descale = fp8_reference(q8, k8, v8, length, scales)
    return _wide(out8, descale)


def _wide(out8: Tensor, descale: Tensor) -> Tensor:
    return (out8.float() * descale[..., None]).to(torch.bfloat16)


def attention_joined(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    """Attention over an FP8 cache in one buffer, in bfloat16; see the module docstring."""
    _check(q8, k8, v8, scales)
    return torch.ops.kinora.attention_joined(q8, k8, v8, length, scales)


def attention_joined_fp8(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The same in e4m3, and what to multiply each row with."""
    _check(q8, k8, v8, scales)
    return torch.ops.kinora.attention_joined_fp8(q8, k8, v8, length, scales)


def _check(q8: Tensor, k8: Tensor, v8: Tensor, scales: Tensor) -> None:
    batch, _, heads, head_dim = q8.shape
    if any(t.dtype != E4M3 for t in (q8, k8, v8)) or head_dim not in HEAD_DIMS or scales.shape != (7,):
        raise ValueError(
            f"q {q8.dtype} {tuple(q8.shape)}, k {k8.dtype}, v {v8.dtype}, scales {tuple(scales.shape)}: all must be "
            f"e4m3 with d in {HEAD_DIMS}, and scales those of `joined_scales`"
        )
    if k8.shape != (batch, k8.shape[1], heads, head_dim) or v8.shape != k8.shape:
        raise ValueError(f"queries {tuple(q8.shape)}, keys {tuple(k8.shape)} and values {tuple(v8.shape)} do not fit")


@torch.library.custom_op("kinora::attention_joined_fp8", mutates_args=())
def _attention_joined_fp8_op(
    q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    if not q8.is_cuda:
        return fp8_reference(q8, k8, v8, length, scales)
    if not available(q8.device):
        raise RuntimeError(
            "attention over a joined FP8 cache needs a Hopper GPU and nvidia-cudnn-frontend: pip install "
            "'kinora[gpu]', or keep the cache as RingFormat(values='fp8')"
        )
    return attention_cudnn.attend_fp8(q8, k8, v8, length, scales), _rows(scales[6], q8)


@_attention_joined_fp8_op.register_fake
def _(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q8), q8.new_empty((*q8.shape[:2], 1), dtype=torch.float32)


@torch.library.custom_op("kinora::attention_joined", mutates_args=())
def _attention_joined_op(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    return _wide(*torch.ops.kinora.attention_joined_fp8(q8, k8, v8, length, scales))


@_attention_joined_op.register_fake
def _(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    return q8.new_empty(q8.shape, dtype=torch.bfloat16)


def _case(
    name: str, queries: int, keys: int, length: int, heads: int, head_dim: int, batch: int = 1, small: bool = True
) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> dict[str, object]:
        def draw(rows: int, scale: float) -> Tensor:
            x = randn(batch, rows, heads, head_dim, device=device, generator=generator)
            return quantize_heads(x, torch.full((heads,), scale, device=device))

        scale = torch.tensor([8.0], device=device)
        return {
            "q8": draw(queries, 8.0),
            "k8": draw(keys, 8.0),
            "v8": draw(keys, 8.0),
            "length": torch.tensor([length], dtype=torch.int32, device=device),
            "scales": joined_scales(scale, scale, scale, 8 * scale),
        }

    flops = 4 * batch * queries * length * heads * head_dim
    moved = batch * heads * head_dim * (3 * queries + 2 * length)
    # the library rounds weights against the running maximum, the reference against the last one (H100: 4.0e-2)
    return Case(name, inputs, 0 if small else flops, 0 if small else moved, small, tolerance=5e-2)


def cases() -> list[Case]:
    """LiveAvatar 14B: 3,168 queries over 2,640 condition keys and a full ring; tails; few queries."""
    return [
        _case("liveavatar-14b", 3168, 15312, 15312, 40, 128, small=False),
        _case("a growing ring", 37, 300, 129, 2, 64, 2),
        _case("two queries", 2, 16, 16, 3, 128),
    ]


OP = Op("attention_joined", attention_joined, reference, cases, differentiable=False)
