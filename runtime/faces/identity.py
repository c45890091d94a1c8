"""Who is drawn: the parameters of a face, its clothes, its background and its drawing style, sampled from a seed.

A seed gives `DRAWS` uniform numbers on the CPU, and every parameter is a fixed function of them, so an identity is
the same on every machine and in every batch. Lengths are in half pictures (the picture spans -1 ... 1, y down) at
scale 1, relative to the centre of the head; colours are RGB in [0, 1]; angles radians.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

HELD_OUT_SEED = 1_000_000_000  # seeds from here on are never used in training
DRAWS = 96

# Light to dark; the sampled tone lies between two neighbours.
SKIN = (
    (0.98, 0.87, 0.79), (0.96, 0.80, 0.69), (0.93, 0.74, 0.60), (0.88, 0.67, 0.51), (0.79, 0.57, 0.41),
    (0.68, 0.46, 0.32), (0.56, 0.37, 0.25), (0.45, 0.29, 0.20),
)  # fmt: skip
HAIR = (
    (0.10, 0.09, 0.10), (0.17, 0.12, 0.10), (0.27, 0.18, 0.12), (0.38, 0.25, 0.15), (0.50, 0.33, 0.18),
    (0.62, 0.34, 0.16), (0.72, 0.55, 0.30), (0.86, 0.72, 0.45), (0.62, 0.62, 0.64), (0.86, 0.86, 0.86),
    (0.20, 0.42, 0.50), (0.45, 0.36, 0.62),
)  # fmt: skip
HAIR_WEIGHTS = (5, 5, 5, 4, 3, 2.5, 3, 3, 2, 1.5, 0.7, 0.7)
EYES = (
    (0.28, 0.18, 0.12), (0.40, 0.26, 0.15), (0.46, 0.36, 0.20), (0.33, 0.47, 0.30), (0.26, 0.45, 0.62),
    (0.40, 0.50, 0.58),
)  # fmt: skip
EYE_WEIGHTS = (5, 4, 2, 2, 3, 2)

# Hair styles as rows of: hairline height, fall of the hairline towards the sides, slope of a parting, waviness of
# the hairline, volume over the skull, back half width, back bottom (below 0: none), curls, bun radius, weight.
HAIR_STYLES = {
    "bald": (-1.20, 0.0, 0.0, 0.0, 0.000, 0.00, -0.60, 0.0, 0.00, 1.0),
    "receding": (-0.43, 1.9, 0.0, 0.0, 0.030, 0.44, -0.10, 0.0, 0.00, 1.0),
    "crop": (-0.30, 1.3, 0.0, 0.0, 0.045, 0.45, 0.00, 0.0, 0.00, 2.0),
    "parted": (-0.31, 1.2, 0.45, 0.0, 0.075, 0.46, 0.02, 0.0, 0.00, 2.0),
    "quiff": (-0.33, 1.0, -0.25, 0.012, 0.130, 0.45, 0.00, 0.0, 0.00, 1.5),
    "curly": (-0.29, 0.9, 0.0, 0.016, 0.110, 0.52, 0.16, 1.0, 0.00, 1.5),
    "afro": (-0.30, 0.9, 0.0, 0.014, 0.150, 0.60, 0.22, 0.7, 0.00, 1.2),
    "bob": (-0.25, 0.5, 0.20, 0.0, 0.085, 0.53, 0.46, 0.0, 0.00, 2.0),
    "bangs": (-0.19, 0.05, 0.0, 0.012, 0.085, 0.52, 0.50, 0.0, 0.00, 1.7),
    "long": (-0.33, 1.0, 0.15, 0.0, 0.080, 0.53, 1.05, 0.0, 0.00, 2.0),
    "long_bangs": (-0.19, 0.08, 0.10, 0.010, 0.085, 0.54, 1.05, 0.0, 0.00, 1.5),
    "wavy": (-0.31, 0.8, -0.20, 0.010, 0.095, 0.57, 0.85, 0.8, 0.00, 1.5),
    "bun": (-0.33, 1.1, 0.0, 0.0, 0.055, 0.45, 0.02, 0.0, 0.14, 1.5),
}


@dataclass(frozen=True)
class Identity:
    """Parameters of B faces; scalars are [B], colours [B, 3]."""

    skin: Tensor
    lip: Tensor
    face_width: Tensor  # half width
    face_height: Tensor  # half height
    jaw: Tensor  # 0 round ... 1 pointed
    cheek: Tensor  # strength of the blush

    hairline: Tensor
    hair_fall: Tensor
    hair_slope: Tensor
    hair_wave: Tensor
    hair_volume: Tensor
    hair_back: Tensor
    hair_bottom: Tensor
    hair_curls: Tensor
    bun: Tensor
    hair: Tensor
    beard: Tensor  # opacity

    eye_width: Tensor  # half width
    eye_height: Tensor
    eye_spacing: Tensor  # centre to centre / 2
    eye_y: Tensor
    eye_tilt: Tensor
    iris: Tensor
    lashes: Tensor  # thickness
    brow_y: Tensor
    brow_thickness: Tensor
    brow_arch: Tensor
    brow_slope: Tensor
    nose_length: Tensor
    nose_width: Tensor
    ear: Tensor  # size
    mouth_y: Tensor
    mouth_size: Tensor
    lip_thickness: Tensor

    clothes: Tensor
    collar: Tensor
    collar_v: Tensor  # 1 V-neck
    collar_shirt: Tensor  # 1 shirt; neither: a crew neck
    shoulders: Tensor  # half width
    stripes: Tensor

    background: Tensor
    background_low: Tensor  # colour at the bottom
    disc: Tensor  # colour of the soft shapes
    disc_strength: Tensor
    disc_x: Tensor
    disc_y: Tensor
    disc_radius: Tensor

    glasses: Tensor  # opacity
    glasses_size: Tensor
    glasses_round: Tensor
    glasses_colour: Tensor

    outline: Tensor  # width
    shading: Tensor  # strength
    softness: Tensor  # width of shading edges

    rest_yaw: Tensor
    rest_pitch: Tensor
    rest_roll: Tensor
    rest_x: Tensor
    rest_y: Tensor
    rest_scale: Tensor

    @property
    def batch(self) -> int:
        return self.skin.shape[0]

    def map(self, function) -> "Identity":
        """An identity whose every parameter is `function(parameter)`."""
        return Identity(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device | str) -> "Identity":
        return self.map(lambda parameter: parameter.to(device))

    def __getitem__(self, index: slice | Tensor) -> "Identity":
        """Some of the faces: `identity[2:5]`."""
        return self.map(lambda parameter: parameter[index])


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[B] each, hue in turns -> RGB [B, 3]."""
    offsets = torch.tensor([5.0, 3.0, 1.0])
    k = (offsets + hue[:, None] * 6.0) % 6.0
    return value[:, None] * (1.0 - saturation[:, None] * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))


class _Draws:
    """Hands out uniform numbers [B] in a fixed order."""

    def __init__(self, seeds: Sequence[int]):
        self.numbers = torch.stack([torch.rand(DRAWS, generator=torch.Generator().manual_seed(s)) for s in seeds])
        self.columns: Iterator[int] = iter(range(DRAWS))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * self.numbers[:, next(self.columns)]

    def chance(self, probability: float) -> Tensor:
        return (self.uniform() < probability).float()

    def choice(self, rows: Tensor, weights: Sequence[float]) -> Tensor:
        """One row of [K, ...] for each face, by weight."""
        edges = torch.tensor(weights).cumsum(0)
        return rows[torch.searchsorted(edges / edges[-1], self.uniform()).clamp(max=len(rows) - 1)]


def sample_identities(seeds: Sequence[int], device: torch.device | str = "cpu") -> Identity:
    """The faces of `seeds` (integers >= 0), parameters on `device`."""
    if len(seeds) == 0:
        raise ValueError("sample_identities needs at least one seed")
    draw = _Draws(seeds)
    uniform, chance = draw.uniform, draw.chance
    jitter = torch.stack([uniform(-0.02, 0.02) for _ in range(3)], 1)

    tone = uniform(0.0, len(SKIN) - 1.001)
    ramp = torch.tensor(SKIN)
    below = tone.long()
    skin = torch.lerp(ramp[below], ramp[below + 1], (tone - below)[:, None]) + jitter
    rosy = skin * torch.tensor([0.86, 0.58, 0.58]) + torch.tensor([0.08, 0.03, 0.04])
    lip = torch.lerp(
        rosy, _hsv(uniform(0.955, 1.0), uniform(0.45, 0.57), uniform(0.66, 0.82)), uniform(0.3, 0.8)[:, None]
    )

    style = draw.choice(torch.tensor([row[:-1] for row in HAIR_STYLES.values()]), [r[-1] for r in HAIR_STYLES.values()])
    hairline, fall, slope, wave, volume, back, bottom, curls, bun = style.unbind(1)
    side = torch.where(uniform() < 0.5, -1.0, 1.0)
    hair = (draw.choice(torch.tensor(HAIR), HAIR_WEIGHTS) + jitter.flip(1)).clamp(0.03, 0.95)
    face_width, face_height = uniform(0.37, 0.44), uniform(0.46, 0.52)

    hue, low_hue = uniform(), uniform()
    pastel = _hsv(hue, uniform(0.08, 0.45), uniform(0.62, 0.97))
    gradient = chance(0.6)[:, None]
    low = torch.lerp(
        pastel, _hsv((hue + 0.12 * (low_hue - 0.5)) % 1.0, uniform(0.1, 0.5), uniform(0.5, 0.95)), gradient
    )
    clothes = _hsv(uniform(0.04, 0.92), uniform(0.15, 0.7), uniform(0.25, 0.9))
    collar_kind = uniform()
    shirt = (collar_kind > 0.7).float()
    plain_collar = torch.lerp(clothes * 0.8, clothes * 0.5 + 0.5, chance(0.5)[:, None])
    collar = torch.lerp(plain_collar, torch.tensor([0.95, 0.95, 0.96]), (shirt * chance(0.6))[:, None])

    identity = Identity(
        skin=skin.clamp(0.0, 1.0),
        lip=lip.clamp(0.0, 1.0),
        face_width=face_width,
        face_height=face_height,
        jaw=uniform(0.0, 1.0),
        cheek=uniform(0.0, 0.5),
        hairline=hairline + uniform(-0.02, 0.02),
        hair_fall=fall * uniform(0.85, 1.15),
        hair_slope=slope * side * uniform(0.6, 1.2),
        hair_wave=wave,
        hair_volume=volume * uniform(0.8, 1.25),
        hair_back=back * (face_width / 0.41) * uniform(0.97, 1.06),
        hair_bottom=bottom + torch.where(bottom > 0.3, uniform(-0.08, 0.12), torch.zeros(len(seeds))),
        hair_curls=curls * uniform(0.7, 1.2),
        bun=bun * uniform(0.85, 1.2),
        hair=hair,
        beard=chance(0.14) * (bottom < 0.3) * (bun == 0) * uniform(0.35, 0.95),
        eye_width=uniform(0.078, 0.102),
        eye_height=uniform(0.042, 0.066),
        eye_spacing=face_width * uniform(0.41, 0.47),
        eye_y=uniform(-0.085, -0.035),
        eye_tilt=uniform(-0.12, 0.18),
        iris=draw.choice(torch.tensor(EYES), EYE_WEIGHTS),
        lashes=uniform(0.012, 0.024),
        brow_y=uniform(0.105, 0.135),
        brow_thickness=uniform(0.014, 0.030),
        brow_arch=uniform(0.5, 2.6),
        brow_slope=uniform(-0.20, 0.22),
        nose_length=uniform(0.13, 0.19),
        nose_width=uniform(0.045, 0.075),
        ear=uniform(0.85, 1.2),
        mouth_y=uniform(0.245, 0.275),
        mouth_size=uniform(0.92, 1.1),
        lip_thickness=uniform(0.022, 0.042),
        clothes=clothes,
        collar=collar,
        collar_v=((collar_kind >= 0.4) & (collar_kind <= 0.7)).float(),
        collar_shirt=shirt,
        shoulders=uniform(0.70, 0.92),
        stripes=chance(0.2) * uniform(0.1, 0.3),
        background=pastel,
        background_low=low,
        disc=_hsv((hue + 0.5 * uniform(-0.3, 0.3)) % 1.0, uniform(0.05, 0.4), uniform(0.7, 1.0)),
        disc_strength=chance(0.5) * uniform(0.25, 0.7),
        disc_x=uniform(-0.8, 0.8),
        disc_y=uniform(-0.8, 0.2),
        disc_radius=uniform(0.3, 0.85),
        glasses=chance(0.22),
        glasses_size=uniform(0.118, 0.150),
        glasses_round=uniform(0.35, 1.0),
        glasses_colour=_hsv(uniform(), uniform(0.0, 0.5), uniform(0.08, 0.4)),
        outline=chance(0.55) * uniform(0.006, 0.014),
        shading=uniform(0.35, 1.0),
        softness=uniform(0.03, 0.30),
        rest_yaw=uniform(-1.0, 1.0) * math.radians(8.0),
        rest_pitch=uniform(-1.0, 1.0) * math.radians(5.0),
        rest_roll=uniform(-1.0, 1.0) * math.radians(5.0),
        rest_x=uniform(-0.05, 0.05),
        rest_y=uniform(-0.09, -0.02),
        rest_scale=uniform(1.04, 1.18),
    )
    return identity.to(device)
