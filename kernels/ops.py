"""The semantic operations that the models are written in; one file each, re-exported here."""

from .adaln import adaln
from .gated_residual import gated_residual
from .linear import linear
from .norm import layer_norm, rms_norm
from .qk_norm_rope import apply_rope, qk_norm_rope
from .rope_attention import rope_attention

__all__ = [
    "adaln",
    "apply_rope",
    "gated_residual",
    "layer_norm",
    "linear",
    "qk_norm_rope",
    "rms_norm",
    "rope_attention",
]
