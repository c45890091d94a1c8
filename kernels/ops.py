"""The semantic operations that the models are written in; one file each, re-exported here."""

from .adaln import adaln
from .attention_fp8 import attention_fp8
from .audio_residual import audio_residual
from .causal_conv3d import causal_conv3d, conv2d, next_history
from .fp8_linear import fp8_linear, quantize_fp8
from .gated_residual import gated_residual
from .kv_cache import qkv_norm_rope, qkv_norm_rope_fp8
from .linear import linear
from .norm import layer_norm, rms_norm
from .qk_norm_rope import apply_rope, head_norm, qk_norm_rope, rotate_rows
from .rope_attention import rope_attention

__all__ = [
    "adaln",
    "apply_rope",
    "attention_fp8",
    "audio_residual",
    "causal_conv3d",
    "conv2d",
    "fp8_linear",
    "gated_residual",
    "head_norm",
    "layer_norm",
    "linear",
    "next_history",
    "qk_norm_rope",
    "qkv_norm_rope",
    "qkv_norm_rope_fp8",
    "quantize_fp8",
    "rms_norm",
    "rope_attention",
    "rotate_rows",
]
