"""Reads the mouth from pixels of drawn (or generated) faces, and says which pixels never move."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .identity import Identity
from .motion import NOD, TILT, TURN, Motion
from .render import DEFAULT_SIZE, render

MOUTH_ROWS = (0.50, 0.86)
MOUTH_COLUMNS = (0.28, 0.72)
# Chroma over brightness: the inside of the mouth reads 0.54, lips and dark skin less than 0.3, hair less than 0.25.
REDNESS = (0.30, 0.38)
MOVES = (TURN, NOD, TILT)


def mouth_inside(video: Tensor) -> Tensor:
    """Soft membership in the maroon of the mouth's inside: [3, T, H, W] in [-1, 1] -> [T, H, W] in [0, 1]."""
    red, green, blue = ((video.float() + 1.0) * 0.5).clamp(0.0, 1.0)
    redness = (red - green) / (red + green + blue + 0.08)
    return ((redness - REDNESS[0]) / (REDNESS[1] - REDNESS[0])).clamp(0.0, 1.0)


def mouth_opening(video: Tensor) -> Tensor:
    """Height of the mouth's inside in pixels: [3, T, H, W] in [-1, 1] -> [T].

    Counts the maroon in each column of the part of the picture where mouths lie and takes the mean of the tallest
    few columns, so that teeth and tongue lower it a little and a shut mouth reads about 0.
    """
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"mouth_opening wants one video [3, T, H, W], got {tuple(video.shape)}")
    height, width = video.shape[-2:]
    rows = slice(int(MOUTH_ROWS[0] * height), int(MOUTH_ROWS[1] * height))
    columns = slice(int(MOUTH_COLUMNS[0] * width), int(MOUTH_COLUMNS[1] * width))
    heights = mouth_inside(video[:, :, rows, columns]).sum(-2)  # [T, columns]
    return heights.topk(max(1, width // 48), -1).values.mean(-1)


def static_region_mask(identity: Identity, size: int = DEFAULT_SIZE, *, margin: float = 0.02) -> Tensor:
    """Pixels of each face's picture that no motion of the driver changes: bool [B, size, size].

    Draws the face at the ends of every movement and keeps what stays the same, less a `margin` (of the size).
    """
    ends = list(itertools.product((0.0, 1.0), *((-move, move) for move in MOVES)))
    poses = torch.tensor([(0.0, 0.0, 0.0, 0.0), *ends], device=identity.skin.device)
    openness, yaw, pitch, roll = (column.expand(identity.batch, -1) for column in poses.unbind(1))
    still = torch.zeros_like(openness)
    video = render(identity, Motion(openness, still, still, yaw, pitch, roll, still, still), size)
    moved = (video.amax(2) - video.amin(2)).amax(1) > 0.01  # [B, size, size]
    reach = max(1, round(margin * size))
    return F.max_pool2d(moved.float()[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0] == 0
