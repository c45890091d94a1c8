"""The drawn world on which the tiny model is trained: identities, the renderer, the motion driver, measuring."""

from .identity import HELD_OUT_SEED, Identity, sample_identities
from .measure import mouth_opening, static_region_mask
from .motion import Motion, motion_from_audio, motion_from_features, rest_motion
from .render import draw_portrait, render

__all__ = [
    "HELD_OUT_SEED",
    "Identity",
    "Motion",
    "draw_portrait",
    "motion_from_audio",
    "motion_from_features",
    "mouth_opening",
    "render",
    "rest_motion",
    "sample_identities",
    "static_region_mask",
]
