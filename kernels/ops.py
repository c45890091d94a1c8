"""The semantic operations that the models are written in; one file each, re-exported here."""

from .adaln import adaln, adaln_fp8
from .attention_fp8 import attention_fp8
from .attention_joined import attention_joined, attention_joined_fp8
from .audio_residual import audio_residual
from .causal_conv3d import causal_conv3d, conv2d, next_history
from .channel_norm import channel_norm, channel_norm_silu
from .fp8_linear import fp8_linear
from .fp8_matmul import fp8_matmul
from .gated_residual import gated_residual
from .gather_taps import gather_taps
from .head_norm_fp8 import head_norm_fp8
from .kv_cache import qkv_norm_rope, qkv_norm_rope_fp8
from .linear import linear
from .norm import layer_norm, rms_norm
from .padded_conv3d import padded_conv3d
from .qk_norm_rope import apply_rope, head_norm, qk_norm_rope, rotate_rows
from .quantize_rows import gelu_quantize_rows, quantize_fp8, quantize_rows
from .residual_norm import residual_norm, residual_norm_fp8
from .rope_attention import rope_attention

__all__ = [
    "adaln",
    "adaln_fp8",
    "apply_rope",
    "attention_fp8",
    "attention_joined",
    "attention_joined_fp8",
    "audio_residual",
    "causal_conv3d",
    "channel_norm",
    "channel_norm_silu",
    "conv2d",
    "fp8_linear",
    "fp8_matmul",
    "gated_residual",
    "gather_taps",
    "gelu_quantize_rows",
    "head_norm",
    "head_norm_fp8",
    "layer_norm",
    "linear",
    "next_history",
    "padded_conv3d",
    "qk_norm_rope",
    "qkv_norm_rope",
    "qkv_norm_rope_fp8",
    "quantize_fp8",
    "quantize_rows",
    "residual_norm",
    "residual_norm_fp8",
    "rms_norm",
    "rope_attention",
    "rotate_rows",
]
