"""Pose video -> pixels of one clip (liveavatar.md, 3.9)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .image import crop_window, resized_shape

MISSING = -1.0  # frames that the pose video does not have
OUTSIDE = 0.0  # pixels beyond a frame that is smaller than the crop: mid grey, unlike the reference picture's black


def pick_pose_frames(source_fps: float, available: int, wanted: int, fps: int = 25) -> np.ndarray:
    """Indices of at most `wanted` of the `available` source frames, one every max(1, round(source_fps / fps))."""
    return np.arange(0, available, max(1, round(source_fps / fps)))[:wanted]


def pose_pixels(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 frames [N, h, w, 3] -> [N, 3, H, W] in [-1, 1], resized in float (antialias) and cropped."""
    x = frames.permute(0, 3, 1, 2).float() / 255 * 2 - 1
    shape = resized_shape(x.shape[2], x.shape[3], min(height, width))
    if shape != tuple(x.shape[2:]):
        x = F.interpolate(x, shape, mode="bilinear", align_corners=False, antialias=True)
    (before_h, after_h, top), (before_w, after_w, left) = crop_window(shape[0], height), crop_window(shape[1], width)
    x = F.pad(x, (before_w, after_w, before_h, after_h), value=OUTSIDE)
    return x[:, :, top : top + height, left : left + width]


def pose_clip(frames: Tensor, clip: int, clip_frames: int, height: int, width: int) -> Tensor:
    """Pixels [1, 3, clip_frames + 1, H, W] of one clip: its frames, -1 where the video has ended, the first doubled.

    The doubled frame becomes the VAE's lone first latent, which the caller drops.
    """
    part = frames[clip * clip_frames : (clip + 1) * clip_frames]
    pixels = torch.full((clip_frames, 3, height, width), MISSING)
    if len(part):
        pixels[: len(part)] = pose_pixels(part, height, width)
    return torch.cat((pixels[:1], pixels)).transpose(0, 1)[None]
