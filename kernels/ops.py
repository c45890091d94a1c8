"""The semantic operations that the models are written in; one file each, re-exported here."""

from .adaln import adaln
from .audio_residual import audio_residual
from .causal_conv3d import causal_conv3d, conv2d, next_history
from .channel_norm import channel_norm
from .fp8_linear import fp8_linear, quantize_fp8
from .gated_residual import gated_residual
from .gather_taps import gather_taps
from .linear import linear
from .norm import layer_norm, rms_norm
from .padded_conv3d import padded_conv3d
from .qk_norm_rope import apply_rope, qk_norm_rope
from .rope_attention import rope_attention

__all__ = [
    "adaln",
    "apply_rope",
    "audio_residual",
    "causal_conv3d",
    "channel_norm",
    "conv2d",
    "fp8_linear",
    "gated_residual",
    "gather_taps",
    "layer_norm",
    "linear",
    "next_history",
    "padded_conv3d",
    "qk_norm_rope",
    "quantize_fp8",
    "rms_norm",
    "rope_attention",
]
