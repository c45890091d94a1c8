"""Tiled encode and decode: spatial tiles that overlap and are blended, for pictures that do not fit into memory.

Every tile is a clip of its own (its own stream state). Its weight is min(row ramp, column ramp), a ramp being 1
except towards neighbours, where it rises 1/b, 2/b, ... 1 over the overlap b; result = sum(w * tile) / sum(w).
Sums lie on the device of the input, tiles are computed on the device of the VAE.  Source: wan.md, 2.1.11.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .wan_vae import DEFAULT_CHUNK, WanVae

Pair = tuple[int, int]
TILE_SIZE: Pair = (34, 34)
TILE_STRIDE: Pair = (18, 16)


def ramp(length: int, border: int, at_start: bool, at_end: bool) -> Tensor:
    """Blend weights [length] along one axis; `at_start` / `at_end`: that side is the border of the picture."""
    weights = torch.ones(length)
    rise = torch.arange(1, border + 1) / border
    if border and not at_start:
        weights[:border] = rise[:length]
    if border and not at_end:
        weights[-border:] = rise.flip(0)[-length:]
    return weights


def tile_starts(length: int, size: int, stride: int) -> list[int]:
    """First rows (or columns) of the tiles that cover `length`; the last one may be cut by the border."""
    return [start for start in range(0, length, stride) if start == 0 or start - stride + size < length]


def encode_tiled(
    vae: WanVae,
    video: Tensor,
    tile_size: Pair = TILE_SIZE,
    tile_stride: Pair = TILE_STRIDE,
    *,
    normalised: bool = True,
    chunk: int | None = DEFAULT_CHUNK,
) -> Tensor:
    """`vae.encode` by tiles whose size and stride are in latent rows and columns; same shapes and errors."""
    vae._check_video(video)
    return _blend(
        lambda tile: vae.encode(tile, normalised=normalised, chunk=chunk),
        video,
        vae,
        (video.shape[0], vae.config.z_dim, vae.config.latent_frames(video.shape[2])),
        tile_size,
        tile_stride,
        unit_in=vae.config.spatial_factor,
        unit_out=1,
    )


def decode_tiled(
    vae: WanVae,
    latents: Tensor,
    tile_size: Pair = TILE_SIZE,
    tile_stride: Pair = TILE_STRIDE,
    *,
    chunk: int | None = DEFAULT_CHUNK,
) -> Tensor:
    """`vae.decode` by tiles, clamped to [-1, 1]; size and stride in latent rows and columns; same shapes and errors."""
    vae._check_latents(latents)
    video = _blend(
        lambda tile: vae.decode(tile, clamp=False, chunk=chunk),
        latents,
        vae,
        (latents.shape[0], 3, vae.config.pixel_frames(latents.shape[2])),
        tile_size,
        tile_stride,
        unit_in=1,
        unit_out=vae.config.spatial_factor,
    )
    return video.clamp_(-1, 1)


def _blend(
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    vae: WanVae,
    shape: tuple[int, int, int],
    size: Pair,
    stride: Pair,
    unit_in: int,
    unit_out: int,
) -> Tensor:
    """Run `compute` on every tile of x and blend; `unit_in`, `unit_out`: input and output pixels per latent one."""
    if not all(0 < step <= extent for extent, step in zip(size, stride, strict=True)):
        raise ValueError(f"tiles of {size} with a stride of {stride} leave gaps; the stride must be 1 ... size")
    device = next(vae.parameters()).device
    rows, columns = x.shape[3] // unit_in, x.shape[4] // unit_in
    total = torch.zeros(*shape, rows * unit_out, columns * unit_out, device=x.device)
    weight = torch.zeros(rows * unit_out, columns * unit_out, device=x.device)
    for top in tile_starts(rows, size[0], stride[0]):
        for left in tile_starts(columns, size[1], stride[1]):
            bottom, right = min(top + size[0], rows), min(left + size[1], columns)
            cut = x[..., top * unit_in : bottom * unit_in, left * unit_in : right * unit_in]
            tile = compute(cut.to(device)).to(x.device)
            mask = torch.minimum(
                ramp((bottom - top) * unit_out, (size[0] - stride[0]) * unit_out, top == 0, bottom == rows)[:, None],
                ramp((right - left) * unit_out, (size[1] - stride[1]) * unit_out, left == 0, right == columns),
            ).to(x.device)
            window = (..., slice(top * unit_out, bottom * unit_out), slice(left * unit_out, right * unit_out))
            total[window] += tile * mask
            weight[window] += mask
    return total / weight
