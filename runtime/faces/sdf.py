"""Signed distances and coverage on picture coordinates.

Every function is elementwise and broadcasts; distances are negative inside, in the units of the coordinates.
"""

import torch
from torch import Tensor

Scalar = Tensor | float


def smoothstep(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, cubic between."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def cover(distance: Tensor, softness: Scalar) -> Tensor:
    """Coverage of a shape whose edge is `softness` wide: 1 inside, 0 outside, one half on the edge."""
    return smoothstep(0.5 - distance / softness)


def circle(x: Tensor, y: Tensor, radius: Scalar) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-8) - radius


def ellipse(x: Tensor, y: Tensor, radius_x: Scalar, radius_y: Scalar) -> Tensor:
    """First-order distance to an ellipse: exact sign, right slope at the edge."""
    u, v = x / radius_x, y / radius_y
    k0 = torch.sqrt(u * u + v * v + 1e-8)
    u, v = u / radius_x, v / radius_y
    return k0 * (k0 - 1.0) / torch.sqrt(u * u + v * v + 1e-8)


def rounded_box(x: Tensor, y: Tensor, half_x: Scalar, half_y: Scalar, radius: Scalar) -> Tensor:
    u, v = x.abs() - half_x + radius, y.abs() - half_y + radius
    outside = torch.sqrt(u.clamp(min=0.0).square() + v.clamp(min=0.0).square() + 1e-10)
    return outside + torch.maximum(u, v).clamp(max=0.0) - radius


def segment(x: Tensor, y: Tensor, ax: Scalar, ay: Scalar, bx: Scalar, by: Scalar, radius: Scalar) -> Tensor:
    """Distance to the capsule of `radius` around the segment from a to b."""
    dx, dy = bx - ax, by - ay
    along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-8)).clamp(0.0, 1.0)
    return torch.sqrt((x - ax - along * dx).square() + (y - ay - along * dy).square() + 1e-10) - radius


def smooth_union(first: Tensor, second: Tensor, radius: Scalar) -> Tensor:
    """Union whose inner corner is rounded over `radius`."""
    blend = (0.5 + 0.5 * (second - first) / radius).clamp(0.0, 1.0)
    return torch.lerp(second, first, blend) - radius * blend * (1.0 - blend)


def between(y: Tensor, top: Tensor, bottom: Tensor, softness: Scalar) -> Tensor:
    """Coverage of top < y < bottom along y; exactly 0 where the strip is empty."""
    above = ((bottom - y) / softness + 0.5).clamp(0.0, 1.0)
    return (above - ((top - y) / softness + 0.5).clamp(0.0, 1.0)).clamp(min=0.0)
