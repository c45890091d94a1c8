"""The picture under the brush: layers are painted one over the other, each only where it can be."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """A fixed part of the picture, as fractions of its height and width, that encloses a layer in every pose."""

    top: float = 0.0
    bottom: float = 1.0
    left: float = 0.0
    right: float = 1.0

    def slices(self, size: int) -> tuple[slice, slice]:
        """Rows and columns of a picture of `size` pixels."""
        rows = slice(int(self.top * size), -int(-self.bottom * size // 1))
        return rows, slice(int(self.left * size), -int(-self.right * size // 1))


@dataclass(frozen=True)
class Grid:
    """Coordinates of the pixel centres of a region, in the frame of a layer, and the width of an edge."""

    x: Tensor  # [B, T, h, w] or broadcastable
    y: Tensor
    edge: Tensor | float  # one and a half pixels in these coordinates
    rows: slice
    columns: slice

    def crop(self, region: Region, size: int) -> "Grid":
        rows, columns = region.slices(size)
        return Grid(self.x[..., rows, columns], self.y[..., rows, columns], self.edge, rows, columns)

    def shift(self, x: Tensor | float, y: Tensor | float) -> "Grid":
        """The same pixels seen from an origin at (x, y)."""
        return replace(self, x=self.x - x, y=self.y - y)

    def scale(self, factor: Tensor) -> "Grid":
        """The same pixels measured in units of `factor`."""
        return replace(self, x=self.x / factor, y=self.y / factor, edge=self.edge / factor)


def picture_grid(size: int, device: torch.device) -> Grid:
    """Picture coordinates: -1 ... 1, y down, [1, 1, size, size]."""
    centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    x = centres.expand(1, 1, size, size)
    return Grid(x, x.transpose(-1, -2), 3.0 / size, slice(0, size), slice(0, size))


class Canvas:
    """Pixels [B, T, 3, H, W] in [0, 1]."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def paint(self, grid: Grid, alpha: Tensor, colour: Tensor) -> None:
        """Lay `colour` [B, T, 3, h, w] (or broadcastable) over the grid's pixels with opacity `alpha` [B, T, h, w]."""
        target = self.pixels[..., grid.rows, grid.columns]
        target.lerp_(colour.expand_as(target), alpha[:, :, None].expand_as(target))


def blend(first: Tensor, second: Tensor, amount: Tensor) -> Tensor:
    """Colour [B, T, 3, h, w]: `first` where amount [B, T, h, w] is 0, `second` where it is 1."""
    return first + (second - first) * amount[:, :, None]
