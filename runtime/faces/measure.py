"""Reads the mouth from pixels of drawn (or generated) faces, and says which pixels never move."""

import torch
import torch.nn.functional as F
from torch import Tensor

MOUTH_ROWS = (0.50, 0.84)
MOUTH_COLUMNS = (0.28, 0.72)
# Chroma over brightness: the inside of the mouth reads 0.51, lips and dark skin at most 0.36, hair 0.25.
REDNESS = (0.37, 0.49)


def mouth_inside(video: Tensor) -> Tensor:
    """Soft membership in the maroon of the mouth's inside: [3, T, H, W] in [-1, 1] -> [T, H, W] in [0, 1]."""
    rgb = (video.float() + 1.0) * 0.5
    red, green, blue = F.avg_pool2d(rgb, 3, stride=1, padding=1, count_include_pad=False)
    redness = (red - green) / (red + green + blue + 0.1).clamp(min=0.1)
    return ((redness - REDNESS[0]) / (REDNESS[1] - REDNESS[0])).clamp(0.0, 1.0)


def mouth_opening(video: Tensor) -> Tensor:
    """Height of the mouth's inside in pixels: [3, T, H, W] in [-1, 1] -> [T].

    The mean over the columns in the middle of the mouth of the visible inside, in the part of the picture where
    mouths lie; a shut mouth reads about 0.
    """
    height, width = video.shape[-2:]
    rows = slice(int(MOUTH_ROWS[0] * height), int(MOUTH_ROWS[1] * height))
    columns = slice(int(MOUTH_COLUMNS[0] * width), int(MOUTH_COLUMNS[1] * width))
    inside = mouth_inside(video[:, :, rows, columns])
    heights = inside.sum(-2)  # [T, columns]
    return heights.topk(max(1, width // 12), -1).values.mean(-1)


def static_region_mask(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Pixels that no face ever moves over, True: [size, size]. The upper corners and the outer shoulders."""
    across = (torch.arange(size, device=device) + 0.5) / size
    side = (across < 0.08) | (across > 0.92)
    corner = (across < 0.13) | (across > 0.87)
    top = (across < 0.22)[:, None] & corner[None]
    return top | (side[None] & (across > 0)[:, None])
