"""The parts of a portrait, back to front. Each paints on a canvas in the coordinates of the grid it is given.

Parameters come shaped for broadcasting: an `Identity` with scalars [B, 1, 1, 1] and colours [B, 1, 3, 1, 1], a
`Motion` with curves [B, T, 1, 1]. Face coordinates: origin at the centre of the head, y down, half pictures.
"""

import torch
from torch import Tensor

from .canvas import Canvas, Grid, blend
from .identity import Identity
from .motion import Motion
from .sdf import between, circle, cover, ellipse, rounded_box, segment, smooth_union, smoothstep

MOUTH_GAP = 0.20  # height of the fully open mouth at size 1
MOUTH_INSIDE = (0.26, 0.015, 0.10)  # dark maroon, drawn nowhere else
TEETH = (0.96, 0.95, 0.92)
TONGUE = (0.80, 0.36, 0.38)
EYE_WHITE = (0.97, 0.97, 0.96)
SHADOW = (0.80, 0.70, 0.70)  # shade of skin, as a factor
JAW_DROP = 0.065


def colour(rgb: tuple[float, float, float], like: Tensor) -> Tensor:
    """A constant colour [1, 1, 3, 1, 1] on the device of `like`."""
    return torch.tensor(rgb, device=like.device).view(1, 1, 3, 1, 1)


def outlined(distance: Tensor, edge: Tensor | float, width: Tensor, fill: Tensor, line: Tensor) -> Tensor:
    """`fill`, with a line of `width` inside the edge of the shape; the line vanishes with its width."""
    amount = smoothstep(0.5 + (distance + width) / edge) * (width > 0)
    return blend(fill, line, amount)


def background(canvas: Canvas, grid: Grid, face: Identity) -> None:
    """A colour or a gradient, and two soft discs. Fills every pixel."""
    down = (grid.y * 0.5 + 0.5).expand(face.batch, 1, -1, -1)
    canvas.pixels.copy_(blend(face.background, face.background_low, down))
    discs = torch.minimum(
        circle(grid.x - face.disc_x, grid.y - face.disc_y, face.disc_radius),
        circle(grid.x + face.disc_x * 1.1, grid.y - face.disc_y - 0.6, face.disc_radius * 0.6),
    )
    canvas.paint(grid, cover(discs, 0.02 + face.softness) * face.disc_strength, face.disc)


def body(canvas: Canvas, grid: Grid, face: Identity) -> None:
    """Shoulders and clothes; the origin is the centre of the head at rest."""
    shape = rounded_box(grid.x, grid.y - 1.42, face.shoulders, 0.74, 0.42)
    slope = rounded_box(grid.x, grid.y - 0.98, 0.20, 0.38, 0.10)
    shape = smooth_union(shape, slope, 0.16)
    stripe = face.stripes * smoothstep(0.5 + 2.0 * torch.sin(grid.y * 42.0))
    fill = face.clothes * (1.0 - stripe[:, :, None])
    side = smoothstep((grid.x * 0.9 + grid.y * 0.2 - 0.35) / (0.1 + face.softness))
    fill = blend(fill, fill * 0.80, side * face.shading)
    fill = outlined(shape, grid.edge, face.outline, fill, face.clothes * 0.45)
    canvas.paint(grid, cover(shape, grid.edge), fill)


def neck(canvas: Canvas, grid: Grid, face: Identity) -> None:
    """Neck and collar, over the hair that falls behind; the origin is the centre of the head at rest."""
    x, y = grid.x, grid.y
    mirrored = x.abs()
    half = face.face_width * 0.40
    opening = ellipse(x, y - 0.66, half + 0.055, 0.115)
    vee = torch.maximum(mirrored * 0.86 + (y - 0.98) * 0.5, 0.60 - y)
    vee = smooth_union(opening, vee, 0.03)
    opening = torch.where(face.collar_v > 0, vee, opening)
    rim = opening - 0.035
    canvas.paint(grid, cover(rim, grid.edge), face.collar)

    column = torch.maximum(rounded_box(x, y - 0.40, half, 0.34, 0.05), -y)
    skin = torch.minimum(column, opening)
    under_chin = smoothstep((face.face_height + 0.16 - y) / (0.05 + 0.5 * face.softness))
    shade = torch.maximum(under_chin, smoothstep((x - 0.03) / (0.04 + face.softness)) * 0.7)
    dark = face.skin * colour(SHADOW, x)
    fill = blend(face.skin, dark, shade * (0.45 + 0.55 * face.shading))
    fill = outlined(skin, grid.edge, face.outline * 0.7, fill, face.skin * 0.55)
    canvas.paint(grid, cover(skin, grid.edge), fill)

    flap = segment(mirrored, y, 0.205, 0.645, 0.105, 0.80, 0.062)
    flap = torch.maximum(flap, 0.60 - y)
    fill = outlined(flap, grid.edge, face.outline.clamp(min=0.004), face.collar, face.collar * 0.62)
    canvas.paint(grid, cover(flap, grid.edge) * face.collar_shirt, fill)


def skull(face: Identity, x: Tensor, y: Tensor, drop: Tensor | float = 0.0) -> Tensor:
    """Distance to the outline of the head; `drop` lengthens the jaw."""
    down = smoothstep(y / face.face_height)
    half = face.face_width * (1.0 - (0.04 + 0.17 * face.jaw) * down)
    height = face.face_height + drop * (y > 0)
    return ellipse(x, y, half, height)


def back_hair(canvas: Canvas, grid: Grid, face: Identity) -> None:
    """Hair behind the head: a cap, a fall to `hair_bottom`, a bun."""
    x, y = grid.x, grid.y
    top = face.face_height + face.hair_volume * 0.9
    back = face.hair_back.clamp(min=0.02)
    nape = y - face.hair_bottom - 0.11
    cap = torch.maximum(ellipse(x, y + 0.04, back, top), nape)
    fall = rounded_box(
        x, y - (face.hair_bottom - 0.1) * 0.5, back, (face.hair_bottom + 0.1).clamp(min=0.02) * 0.5, 0.12
    )
    shape = smooth_union(cap, fall, 0.06)
    bun = circle(x, y + top + 0.45 * face.bun, face.bun.clamp(min=0.001))
    shape = torch.minimum(shape, bun)
    shape = shape - 0.022 * face.hair_curls * torch.sin(x * 27.0) * torch.cos(y * 25.0)
    deep = smoothstep((y + 0.30) / 0.6)
    fill = blend(face.hair * 0.92, face.hair * 0.70, deep)
    fill = outlined(shape, grid.edge, face.outline, fill, face.hair * 0.45)
    visible = smoothstep(face.hair_back * 8.0 - 1.0)
    canvas.paint(grid, cover(shape, grid.edge) * visible, fill)


def ears(canvas: Canvas, grid: Grid, face: Identity) -> None:
    x, y = grid.x.abs() - face.face_width * 0.985, grid.y - 0.02
    shape = ellipse(x, y, 0.062 * face.ear, 0.105 * face.ear)
    inner = ellipse(x - 0.01, y, 0.032 * face.ear, 0.066 * face.ear)
    fill = blend(face.skin * 0.97, face.skin * colour(SHADOW, x), cover(inner, 0.03) * 0.8)
    fill = outlined(shape, grid.edge, face.outline, fill, face.skin * 0.5)
    canvas.paint(grid, cover(shape, grid.edge), fill)


def head(canvas: Canvas, grid: Grid, face: Identity, motion: Motion) -> None:
    """Skin of the head with the shadow of its side, blush and beard."""
    x, y = grid.x, grid.y
    drop = JAW_DROP * motion.openness
    shape = skull(face, x, y, drop)
    lit = ellipse(x + 0.085, y + 0.05, face.face_width * 0.98, face.face_height * 1.02)
    shade = smoothstep(0.5 + lit / (0.02 + face.softness))
    fill = blend(face.skin, face.skin * colour(SHADOW, x), shade * face.shading)
    blush = cover(ellipse(x.abs() - face.face_width * 0.56, y - 0.15, 0.075, 0.055), 0.09)
    fill = blend(fill, fill * colour((1.0, 0.80, 0.78), x), blush * face.cheek)
    beard = cover(0.16 - y - 0.6 * (x.abs() - 0.41).clamp(min=-0.30), 0.05)
    fill = blend(fill, face.hair, beard * face.beard)
    fill = outlined(shape, grid.edge, face.outline, fill, face.skin * 0.48)
    canvas.paint(grid, cover(shape, grid.edge), fill)


def fringe(canvas: Canvas, grid: Grid, face: Identity) -> None:
    """Hair over the forehead: the part of a slightly larger skull above the hairline."""
    x, y = grid.x, grid.y
    volume = face.hair_volume * smoothstep((0.12 - y) / 0.55) + 0.014
    shape = skull(face, x, y) - volume
    shape = shape - 0.02 * face.hair_curls * torch.sin(x * 27.0) * torch.cos(y * 25.0)
    line = face.hairline + face.hair_fall * x * x + face.hair_slope * x + face.hair_wave * torch.sin(x * 31.0)
    shape = torch.maximum(shape, (y - line) * 0.85)
    shine = cover((ellipse(x + 0.06, y + 0.02, face.face_width * 0.86, face.face_height * 0.90)).abs() - 0.022, 0.05)
    shine = shine * smoothstep(-y * 4.0) * smoothstep((0.25 - x) * 4.0)
    side = smoothstep((x - 0.05) / (0.05 + face.softness)) * 0.7
    fill = blend(face.hair, face.hair * 0.80, side * face.shading)
    fill = blend(fill, face.hair * 0.75 + 0.25, shine * 0.55)
    fill = outlined(shape, grid.edge, face.outline, fill, face.hair * 0.45)
    canvas.paint(grid, cover(shape, grid.edge), fill)


def eyes(canvas: Canvas, grid: Grid, face: Identity, motion: Motion) -> None:
    """Both eyes in mirrored coordinates: white, iris, pupil, light, lid and lashes."""
    side = torch.where(grid.x > 0, 1.0, -1.0)
    x, y = grid.x.abs() - face.eye_spacing, grid.y - face.eye_y
    y = y + face.eye_tilt * x
    half, height = face.eye_width, face.eye_height
    profile = (1.0 - (x / half).square()).clamp(min=0.0)
    bottom = 0.62 * height * profile
    top = -height * profile
    lid = torch.lerp(top, bottom, motion.blink)
    dark = face.skin * colour((0.72, 0.58, 0.58), x)

    crease = lid.minimum(0.3 * top) - 0.026 * profile.sqrt()
    canvas.paint(grid, between(y, crease, lid, grid.edge) * 0.40, dark)

    opening = between(y, lid, bottom, grid.edge * 0.7)
    iris_x = x - side * motion.gaze_x * 0.026
    iris_y = y - motion.gaze_y * 0.014 + 0.14 * height
    radius = 0.80 * height + 0.006
    iris = circle(iris_x, iris_y, radius)
    fill = blend(colour(EYE_WHITE, x), face.iris * 0.55, cover(iris, grid.edge))
    fill = blend(fill, face.iris, cover(iris + 0.011, grid.edge))
    fill = blend(fill, colour((0.05, 0.04, 0.05), x), cover(iris + radius * 0.52, grid.edge))
    light = circle(side * iris_x + radius * 0.36, iris_y + radius * 0.38, radius * 0.25)
    fill = blend(fill, colour((1.0, 1.0, 1.0), x), cover(light, grid.edge))
    fill = blend(fill, fill * 0.72, smoothstep((lid + 0.024 - y) / 0.03))
    canvas.paint(grid, opening, fill)

    thick = face.lashes * (0.35 + 0.65 * profile) * smoothstep((half * 1.08 - x.abs()) / 0.02)
    lash = face.hair.clamp(max=0.35) * 0.45
    canvas.paint(grid, between(y, lid - 0.75 * thick, lid + 0.45 * thick, grid.edge * 0.7), lash)
    canvas.paint(grid, between(y, bottom, bottom + 0.008 * profile, grid.edge) * 0.6, dark)


def brows(canvas: Canvas, grid: Grid, face: Identity, motion: Motion) -> None:
    """Tapered arcs that rise a little with the voice and sink with a blink."""
    x = grid.x.abs() - face.eye_spacing - 0.005
    lift = 0.016 * motion.openness - 0.012 * motion.blink
    middle = face.eye_y - face.brow_y - lift + face.brow_arch * x * x - face.brow_slope * x
    half = face.eye_width * 1.22
    thick = face.brow_thickness * (0.55 - 0.45 * x / half) * smoothstep((half - x.abs()) / 0.03)
    alpha = between(grid.y, middle - thick, middle + thick, grid.edge * 0.8)
    canvas.paint(grid, alpha, face.hair.clamp(max=0.6) * 0.68)


def nose(canvas: Canvas, grid: Grid, face: Identity) -> None:
    """A shaded flank, the line under the tip, nostrils."""
    x, y = grid.x, grid.y - face.eye_y
    length, half = face.nose_length, face.nose_width
    dark = face.skin * colour((0.74, 0.60, 0.58), x)
    flank = torch.maximum(segment(x, y, 0.012, 0.0, half * 0.55, length - 0.01, 0.022), -x)
    canvas.paint(grid, cover(flank, 0.035) * (0.25 + 0.4 * face.shading), dark)
    tip = ellipse(x + half * 0.15, y - length + 0.02, half * 0.55, 0.028)
    canvas.paint(grid, cover(tip, 0.04) * 0.35, face.skin * 0.6 + 0.4)
    line = length + 0.012 - 2.2 * x * x
    thick = 0.008 * smoothstep((half - x.abs()) / 0.02)
    nostril = ellipse(x.abs() - half * 0.55, y - length - 0.003, 0.016, 0.009)
    alpha = torch.maximum(between(y, line - thick, line + thick, grid.edge), cover(nostril, grid.edge) * 0.8)
    canvas.paint(grid, alpha, face.skin * colour((0.58, 0.42, 0.40), x))


def mouth(canvas: Canvas, grid: Grid, face: Identity, motion: Motion) -> None:
    """Lips, and between them the maroon inside with teeth and tongue; a shut mouth shows no inside at all."""
    x, y = grid.x, grid.y - face.mouth_y
    gap = MOUTH_GAP * face.mouth_size * motion.openness  # [B, T, 1, 1]
    half = face.mouth_size * (0.145 + 0.030 * motion.width - 0.022 * motion.openness)
    along = x / half
    profile = (1.0 - along.square()).clamp(min=0.0)
    rounding = (motion.openness * 1.6).clamp(max=1.0)
    curve = torch.lerp(profile, profile.sqrt(), 0.6 * rounding)
    smile = 0.035 * (along.square() - 0.4) * (1.0 - 0.6 * rounding)
    top = -0.24 * gap * curve - smile
    bottom = 0.76 * gap * curve - smile
    edge = grid.edge * 0.75

    outer = (1.0 - (x / (half + 0.022)).square()).clamp(min=0.0)
    bow = 1.0 - 0.30 * torch.exp(-(x / 0.035).square())
    stretch = face.lip_thickness * (1.0 - 0.18 * motion.openness)
    upper = top - stretch * 0.85 * outer.sqrt() * outer.sqrt().sqrt() * bow
    lower = bottom + stretch * 1.15 * outer.sqrt() * outer.sqrt().sqrt()
    fill = blend(face.lip * 0.88, face.lip, cover(top - y, 0.02))
    shine = cover(ellipse(x + 0.02, y - bottom - stretch * 0.5, half * 0.42, stretch * 0.25), 0.03)
    fill = blend(fill, face.lip * 0.7 + 0.3, shine * 0.5)
    canvas.paint(grid, between(y, lower, lower + 0.03 * outer, 0.04) * 0.30, face.skin * colour(SHADOW, x))
    canvas.paint(grid, between(y, upper, lower, edge), fill)
    canvas.paint(grid, between(y, top - 0.006 * outer, bottom + 0.004 * outer, edge), face.lip * 0.72)

    inside = between(y, top, bottom, edge)
    fill = colour(MOUTH_INSIDE, x)
    tongue = ellipse(x, y - bottom - 0.012, half * 0.60, (gap - 0.07).clamp(min=0.0) * 0.40 + 0.002)
    fill = blend(fill, colour(TONGUE, x), cover(tongue, 0.03) * smoothstep((gap - 0.08) / 0.04))
    teeth = (0.22 * gap).clamp(max=0.032)
    bite = cover(y - top - teeth, edge) * smoothstep((half * 0.86 - x.abs()) / 0.02) * smoothstep((gap - 0.02) / 0.03)
    fill = blend(fill, colour(TEETH, x), bite)
    canvas.paint(grid, inside, fill)


def glasses(canvas: Canvas, grid: Grid, face: Identity) -> None:
    x, y = grid.x.abs(), grid.y - face.eye_y - 0.01
    size = face.glasses_size
    lens = rounded_box(x - face.eye_spacing, y, size, size * 0.82, size * 0.8 * face.glasses_round)
    bridge = segment(x, y, 0.0, -0.035, 0.5 * face.eye_spacing, -0.02, 0.002)
    bridge = torch.maximum(bridge, -lens)
    temple = segment(x, y, face.eye_spacing + size, -0.03, face.face_width + 0.02, -0.05, 0.002)
    frame = torch.minimum(torch.minimum(lens.abs(), bridge), temple) - 0.011
    canvas.paint(grid, cover(lens, grid.edge) * 0.10 * face.glasses, colour((1.0, 1.0, 1.0), x))
    canvas.paint(grid, cover(frame, grid.edge) * face.glasses, face.glasses_colour)
