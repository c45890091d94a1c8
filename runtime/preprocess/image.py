"""Reference picture -> pixels: resize the shorter side, crop the centre, scale to [-1, 1] (liveavatar.md, 3.1)."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) after the shorter side became `shorter`; the longer side is truncated."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def crop_window(size: int, target: int) -> tuple[int, int, int]:
    """(padding before, padding after, offset of the crop) that bring an axis from `size` to `target` pixels."""
    missing = max(target - size, 0)
    return missing // 2, (missing + 1) // 2, round((max(size, target) - target) / 2)


def crop_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """RGB image of exactly `width` x `height`: bilinear, rounded to uint8; black where the picture is too small."""
    new_h, new_w = resized_shape(image.height, image.width, min(height, width))
    resized = image.convert("RGB").resize((new_w, new_h), Image.Resampling.BILINEAR)
    (before_h, _, top), (before_w, _, left) = crop_window(new_h, height), crop_window(new_w, width)
    left, top = left - before_w, top - before_h
    return resized.crop((left, top, left + width, top + height))  # outside the picture: black


def image_pixels(image: Image.Image | np.ndarray, height: int, width: int) -> Tensor:
    """Pixels [3, H, W] float32 in [-1, 1] of a PIL image or a uint8 RGB array [h, w, 3]."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    pixels = torch.from_numpy(np.array(crop_image(image, height, width))).permute(2, 0, 1)
    return pixels.float() / 255 * 2 - 1
