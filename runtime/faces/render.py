"""Draws faces in motion: a batched renderer of signed-distance shapes in plain torch.

Nothing but values depends on the data, so `draw_frames` compiles to one graph; layers that move in a small part of
the picture are computed only there.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from . import parts
from .canvas import Canvas, Grid, Region, picture_grid
from .identity import Identity, sample_identities
from .motion import Motion, rest_motion

DEFAULT_SIZE = 192
CHUNK = 256  # pictures of 192 x 192 drawn at a time

PIVOT = 0.45  # the head rolls around the neck
# How far a layer moves with the turn of the head: its depth before the axis of the neck, in half pictures.
BACK_HAIR, EARS, SKULL, FRINGE, EYES, NOSE, MOUTH, GLASSES = -0.10, -0.04, 0.07, 0.12, 0.26, 0.38, 0.28, 0.28

WHOLE = Region()
HEAD = Region(0.0, 0.92, 0.05, 0.95)
UPPER_FACE = Region(0.20, 0.72, 0.10, 0.90)
LOWER_FACE = Region(0.48, 0.88, 0.25, 0.75)
BODY = Region(0.60, 1.0, 0.0, 1.0)


def _shape_identity(identity: Identity) -> Identity:
    """Scalars to [B, 1, 1, 1], colours to [B, 1, 3, 1, 1]."""
    return identity.map(lambda p: p[:, None, None, None] if p.ndim == 1 else p[:, None, :, None, None])


def _head_grid(grid: Grid, face: Identity, motion: Motion) -> tuple[Grid, Tensor, Tensor]:
    """Coordinates of the head [B, T, H, W], and the sines of its whole yaw and pitch [B, T, 1, 1]."""
    yaw, pitch = torch.sin(face.rest_yaw + motion.yaw), torch.sin(face.rest_pitch + motion.pitch)
    roll = face.rest_roll + motion.roll
    cosine, sine = torch.cos(roll), torch.sin(roll)
    level = grid.shift(face.rest_x, face.rest_y).scale(face.rest_scale)
    level = level.shift(0.12 * torch.sin(motion.yaw), 0.16 * torch.sin(motion.pitch) + PIVOT)
    head = replace(level, x=cosine * level.x + sine * level.y, y=cosine * level.y - sine * level.x + PIVOT)
    return head, yaw, pitch


def draw_frames(identity: Identity, motion: Motion, size: int) -> Tensor:
    """One chunk: [B] faces, [B, T] motion -> [B, T, 3, size, size] in [0, 1]."""
    frames = motion.shape[1]
    face = _shape_identity(identity)
    motion = motion.map(lambda curve: curve[:, :, None, None])
    picture = picture_grid(size, face.skin.device)

    still = Canvas(face.skin.new_empty(face.batch, 1, 3, size, size))
    parts.background(still, picture, face)
    torso = picture.crop(BODY, size).shift(0.75 * face.rest_x, face.rest_y).scale(face.rest_scale)
    parts.body(still, torso, face)
    canvas = Canvas(still.pixels.repeat(1, frames, 1, 1, 1))

    head, yaw, pitch = _head_grid(picture, face, motion)

    def layer(region: Region, depth: float) -> Grid:
        return head.crop(region, size).shift(depth * yaw, depth * pitch)

    parts.back_hair(canvas, layer(WHOLE, BACK_HAIR), face)
    parts.neck(canvas, torso, face)
    parts.ears(canvas, layer(HEAD, EARS), face)
    parts.head(canvas, layer(HEAD, SKULL), face, motion)
    parts.nose(canvas, layer(UPPER_FACE, NOSE), face)
    parts.mouth(canvas, layer(LOWER_FACE, MOUTH), face, motion)
    parts.eyes(canvas, layer(UPPER_FACE, EYES), face, motion)
    parts.brows(canvas, layer(UPPER_FACE, EYES), face, motion)
    parts.fringe(canvas, layer(HEAD, FRINGE), face)
    parts.glasses(canvas, layer(UPPER_FACE, GLASSES), face)
    return canvas.pixels


@torch.no_grad()
def render(
    identity: Identity,
    motion: Motion,
    size: int = DEFAULT_SIZE,
    *,
    chunk: int = CHUNK,
    draw: Callable[[Identity, Motion, int], Tensor] = draw_frames,
) -> Tensor:
    """[B] faces and [B, T] motion on one device -> video [B, 3, T, size, size] in [-1, 1], float32.

    `chunk` bounds memory: at most that many pictures of 192 x 192 (or as many pixels) are in work at a time.
    `draw`: `draw_frames`, or what `torch.compile` makes of it (7 times faster on a GPU).
    """
    batch, frames = motion.shape
    if identity.batch != batch:
        raise ValueError(f"{identity.batch} identities but motion for {batch}; give one motion row for each face")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    video = identity.skin.new_empty(batch, 3, frames, size, size)
    pictures = max(1, chunk * DEFAULT_SIZE**2 // size**2)
    time_step = min(frames, pictures)
    batch_step = max(1, pictures // max(1, time_step))
    for row in range(0, batch, batch_step):
        rows = slice(row, row + batch_step)
        for start in range(0, frames, time_step):
            span = slice(start, start + time_step)
            drawn = draw(identity[rows], motion[rows, span], size)
            torch.mul(drawn.transpose(1, 2), 2.0, out=video[rows, :, span]).sub_(1.0)
    return video


def draw_portrait(seed: int, size: int = 512) -> Image.Image:
    """The face of `seed` at rest, mouth shut, as an RGB picture: what a tiny avatar starts from."""
    pixels = render(sample_identities([seed]), rest_motion(), size)[0, :, 0]
    return Image.fromarray(((pixels + 1.0) * 127.5).round().byte().permute(1, 2, 0).numpy())
