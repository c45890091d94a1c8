"""Attention over an FP8 cache in one buffer with one scale a tensor, by cuDNN (extra `gpu`); see `attention_cudnn`.

    O = softmax(q K^T / sqrt(d)) V over the first `length` rows,   q = q8 / scale_q, K = k8 / scale_k, V = v8 / scale_v
    result: O in bfloat16, or e4m3(scale_o O) with 1 / scale_o for each row (`attention_joined_fp8`)

Shapes: q8 [B, Lq, H, d], k8 and v8 [B, L, H, d] e4m3, `length` int32 [1] on the device, `scales` float32 [8 + R]
(`joined_scales`) with R >= B Lq. Result [B, Lq, H, d]; descale float32 [B, Lq, 1], a view of `scales`.
Dtypes: both products accumulate in float32, softmax in float32; the weights round to e4m3 (times 448, against the
maximum), and so does the result, also where it is returned in bfloat16: Hopper's cuDNN has no other.
Error: relative L2 on uncorrelated normal data, 15,312 keys of d = 128: 6.0e-2 (`attention_fp8`: 5.3e-2). e4m3 has the
same relative precision over fifteen octaves, so one scale a tensor costs nothing until heads differ by hundreds.
Non-finite values: rows beyond `length` must be finite. Inference only.
Errors: ValueError when shapes do not fit; RuntimeError on a GPU without the library, and from it for a single query.
"""

import torch
from torch import Tensor

from . import attention_cudnn
from .cases import Case, Op, randn
from .kv_cache import E4M3, quantize_heads
from .qk_rows import HEAD_DIMS

WEIGHT_SCALE = 448.0
ROWS_AT = 8
"""Where the descales of the rows begin in `scales`: products want them aligned to 16 bytes."""


def joined_scales(scale_q: Tensor, scale_k: Tensor, scale_v: Tensor, scale_o: Tensor, rows: int) -> Tensor:
    """Float32 [8 + rows] of four one-element scales: descales of q, K, V and of the weights, scale of the weights, of
    the result, and its descale; one that is not used; the result's descale again for each of `rows`, so that no
    attention has to write it."""
    scales = torch.cat([scale.reshape(1) for scale in (scale_q, scale_k, scale_v, scale_o)]).float()
    descales, one = 1 / scales, scales[:1]
    weights = torch.full_like(one, 1 / WEIGHT_SCALE), torch.full_like(one, WEIGHT_SCALE)
    result = descales[3:].expand(ROWS_AT - 6 + rows)
    return torch.cat((descales[:3], *weights, scales[3:], result))


def row_descales(q8: Tensor, scales: Tensor) -> Tensor:
    """What to multiply each row of an e4m3 result for q8 [B, Lq, H, d] with: [B, Lq, 1], a view of `scales`."""
    batch, queries = q8.shape[:2]
    return scales[ROWS_AT : ROWS_AT + batch * queries].view(batch, queries, 1)


def available(device: torch.device) -> bool:
    """Whether the library is there for this device; on the CPU the reference always is."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device)[0] == 9 and attention_cudnn.has_fp8()


def fp8_reference(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    """The same roundings in plain PyTorch, except that weights round against the maximum over all keys at once."""
    rows = min(int(length), k8.shape[1])
    descale_q, descale_k, descale_v, _, _, scale_o = scales[:6].unbind()
    scores = torch.einsum("bqhd,bkhd->bhqk", q8.float(), k8[:, :rows].float())
    scores = scores * (descale_q * descale_k * q8.shape[3] ** -0.5)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (weights * WEIGHT_SCALE).to(E4M3).float() / WEIGHT_SCALE
    total = weights.sum(-1).transpose(1, 2)[..., None]  # [B, Lq, H, 1]
    out = torch.einsum("bhqk,bkhd->bqhd", rounded, v8[:, :rows].float()) * descale_v / total
    return quantize_heads(out, scale_o.expand(q8.shape[2])).contiguous()


def reference(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    return _wide(fp8_reference(q8, k8, v8, length, scales), scales)


def _wide(out8: Tensor, scales: Tensor) -> Tensor:
    return (out8.float() * scales[6]).to(torch.bfloat16)


def attention_joined(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    """Attention over an FP8 cache in one buffer, in bfloat16; see the module docstring."""
    _check(q8, k8, v8, length, scales)
    return torch.ops.kinora.attention_joined(q8, k8, v8, length, scales)


def attention_joined_fp8(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The same in e4m3, and what to multiply each row with."""
    _check(q8, k8, v8, length, scales)
    return torch.ops.kinora.attention_joined_fp8(q8, k8, v8, length, scales), row_descales(q8, scales)


def _check(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> None:
    batch, queries, heads, head_dim = q8.shape
    if any(t.dtype != E4M3 for t in (q8, k8, v8)) or head_dim not in HEAD_DIMS:
        raise ValueError(
            f"q {q8.dtype} {tuple(q8.shape)}, k {k8.dtype}, v {v8.dtype}: all must be e4m3 with d in {HEAD_DIMS}"
        )
    if scales.dim() != 1 or scales.shape[0] < ROWS_AT + batch * queries or scales.dtype != torch.float32:
        raise ValueError(
            f"scales {tuple(scales.shape)} {scales.dtype} are not those of `joined_scales` for at least "
            f"{batch * queries} rows"
        )
    if length.dtype != torch.int32 or length.numel() != 1:
        raise ValueError(f"length {tuple(length.shape)} {length.dtype} must be one int32")
    if k8.shape != (batch, k8.shape[1], heads, head_dim) or v8.shape != k8.shape:
        raise ValueError(f"queries {tuple(q8.shape)}, keys {tuple(k8.shape)} and values {tuple(v8.shape)} do not fit")


@torch.library.custom_op("kinora::attention_joined_fp8", mutates_args=())
def _attention_joined_fp8_op(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    if not q8.is_cuda:
        return fp8_reference(q8, k8, v8, length, scales)
    if not available(q8.device):
        raise RuntimeError(
            "attention over a joined FP8 cache needs a Hopper GPU and nvidia-cudnn-frontend: pip install "
            "'kinora[gpu]', or keep the cache as RingFormat(values='fp8')"
        )
    return attention_cudnn.attend_fp8(q8, k8, v8, length, scales)


@_attention_joined_fp8_op.register_fake
def _(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    return q8.new_empty(q8.shape)


@torch.library.custom_op("kinora::attention_joined", mutates_args=())
def _attention_joined_op(q8: Tensor, k8: Tensor, v8: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    return _wide(torch.ops.kinora.attention_joined_fp8(q8, k8, v8, length, scales), scales)


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
            "scales": joined_scales(scale, scale, scale, 8 * scale, batch * queries),
        }

    flops = 4 * batch * queries * length * heads * head_dim
    moved = batch * heads * head_dim * (3 * queries + 2 * length)
    # the library rounds weights against the running maximum, the reference against the last one (H100: 4.0e-2)
    return Case(name, inputs, 0 if small else flops, 0 if small else moved, small, tolerance=5e-2)


def cases() -> list[Case]:
    """LiveAvatar 14B: 3,168 queries over 2,640 condition keys and a full ring, over a prompt; tails; few queries."""
    return [
        _case("liveavatar-14b", 3168, 15312, 15312, 40, 128, small=False),
        _case("liveavatar-14b, text", 3168, 512, 512, 40, 128, small=False),
        _case("a growing ring", 37, 300, 129, 2, 64, 2),
        _case("two queries", 2, 16, 16, 3, 128),
    ]


OP = Op("attention_joined", attention_joined, reference, cases, differentiable=False)
