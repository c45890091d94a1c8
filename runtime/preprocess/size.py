"""The video size for a picture: sides in whole patches, area at most a limit (liveavatar.md, 3.1)."""

import math

from ..errors import InputError


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def select_size(height: int, width: int, max_area: int, divisor: int = 64) -> tuple[int, int]:
    """(height, width) of the video for a picture of `height` x `width` pixels.

    Both are multiples of `divisor`, their product is at most `max_area`, and the aspect ratio is near the picture's:
    the largest of 100 scales whose padded size fits. Small pictures are padded up.
    Errors: InputError when not even one patch fits, or the picture is empty.
    """
    if height < 1 or width < 1:
        raise InputError(f"a picture of {width}x{height} pixels is empty; pass one with at least one pixel")
    if max_area < divisor * divisor:
        raise InputError(f"an area of {max_area} pixels is below one patch; allow at least {divisor}x{divisor}")
    area, pad = height * width, divisor - 1
    if area <= max_area:
        smallest, largest = 0.1, 1.0
    else:
        # 2ac where a root of the quadratic has 4ac: upstream's slip, kept because sizes depend on it
        linear, constant = pad * (height + width), pad * pad - max_area
        smallest = (-linear + math.sqrt(linear * linear - 2 * area * constant)) / (2 * area)
        largest = math.sqrt(max_area / area)
    for i in range(100):
        scale = largest - (largest - smallest) * i / 100
        fitted = _round_up(int(height * scale), divisor), _round_up(int(width * scale), divisor)
        if 0 < math.prod(fitted) <= max_area:
            return fitted
    return _by_aspect(height, width, max_area, divisor)


def _by_aspect(height: int, width: int, max_area: int, divisor: int) -> tuple[int, int]:
    """Fallback: sides from the area and the aspect ratio, rounded down, never above the picture's own."""
    aspect = width / height
    target_h = int(math.sqrt(max_area / aspect) // divisor * divisor)
    target_w = int(math.sqrt(max_area * aspect) // divisor * divisor)
    if target_w >= width or target_h >= height:
        target_h, target_w = height // divisor * divisor, width // divisor * divisor
    if not target_h or not target_w:
        raise InputError(
            f"a picture of {width}x{height} pixels is too narrow for an area of {max_area}; crop it or pass `size`"
        )
    return target_h, target_w
