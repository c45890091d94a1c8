"""Cuts between scenes, by the content measure of PySceneDetect's ContentDetector with its defaults."""

import torch
from torch import Tensor

THRESHOLD = 27.0
MIN_SCENE = 15  # frames between two cuts


def hsv(frame: Tensor) -> Tensor:
    """RGB uint8 [H, W, 3] -> float hue 0..180, saturation and value 0..255 [H, W, 3], in whole levels."""
    x = frame.float()
    value, low = x.amax(-1), x.amin(-1)
    spread = value - low
    r, g, b = x.unbind(-1)
    safe = spread.clamp(min=1.0)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = torch.where(spread > 0, (30 * hue) % 180, 0.0)
    saturation = 255 * spread / value.clamp(min=1.0)
    return torch.stack((hue, saturation, value), -1).round()


def find_scenes(frames: Tensor, threshold: float = THRESHOLD, min_scene: int = MIN_SCENE) -> list[tuple[int, int]]:
    """Scenes [first, end) of RGB uint8 frames [T, H, W, 3]; one over everything when nothing cuts."""
    starts = [0]
    previous = None
    for number, frame in enumerate(frames):
        current = hsv(frame)
        if previous is not None:
            change = float((current - previous).abs().mean())  # mean over pixels and over the three components
            if change >= threshold and number - starts[-1] >= min_scene:
                starts.append(number)
        previous = current
    return list(zip(starts, [*starts[1:], len(frames)], strict=True))
