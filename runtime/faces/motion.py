"""Sound -> motion of a drawn face: deterministic, and a function of a short window of levelled speech features.

All curves are computed on the 50 Hz grid of `graphs.models.speech_features` and read at 25 fps: video frame i shows
the sound at (i + 0.5) / 25 s, midway between features 2i and 2i + 1. A video frame depends on features
2i - PAST_FEATURES ... 2i + 1 + FUTURE_FEATURES alone, which is 1.2 s of past and 0.1 s of future sound.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graphs.models import speech_features
from ...graphs.models.speech_features import FEATURE_RANGE, HOP, band_mask, levelled_log_mel

FPS = 25
SAMPLES_PER_VIDEO_FRAME = speech_features.SAMPLE_RATE // FPS
FEATURES_PER_VIDEO_FRAME = SAMPLES_PER_VIDEO_FRAME // HOP
PAST_FEATURES = 59
FUTURE_FEATURES = 3

# The mouth opens for vowels: the murmur of m and n lies below this band, the hiss of s and f above it.
VOWEL_BAND = (330.0, 3600.0)  # Hz
ROUND_BAND = (250.0, 950.0)  # Hz, where rounded vowels have both formants
SPREAD_BAND = (1500.0, 3600.0)  # Hz, second formant of spread vowels
SHUT_DB, OPEN_DB = -25.0, -2.5  # vowel-band loudness against the level: the mouth shut, fully open
COMPRESSION = 32.0  # dB a factor of 10 in openness: amplitude to the power 0.625
VOICED = 0.05  # openness that counts as speech

ATTACK = 3  # features: 60 ms
RELEASE = 5  # features: 100 ms
PHRASE = 15  # features: 300 ms of speech before a blink
PAUSE = 9  # features: 180 ms of silence after it
BLINK = 10  # features: 200 ms, 5 video frames

NOD = math.radians(4.5)
TURN = math.radians(6.0)
TILT = math.radians(4.0)


@dataclass(frozen=True)
class Motion:
    """Curves [B, T] at 25 fps. Angles are radians relative to the identity's rest pose."""

    openness: Tensor  # 0 shut ... 1
    width: Tensor  # -1 rounded ... 1 spread
    blink: Tensor  # 0 eyes open ... 1 closed
    yaw: Tensor  # to the picture's right
    pitch: Tensor  # down
    roll: Tensor  # clockwise in the picture
    gaze_x: Tensor  # -1 ... 1, to the picture's right
    gaze_y: Tensor  # -1 ... 1, down

    @property
    def shape(self) -> torch.Size:
        return self.openness.shape

    def to(self, device: torch.device | str) -> "Motion":
        return self.map(lambda curve: curve.to(device))

    def map(self, function) -> "Motion":
        """A motion whose every curve is `function(curve)`, e.g. a slice of time."""
        return Motion(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def __getitem__(self, index) -> "Motion":
        """`motion[:, 10:20]`: index every curve."""
        return self.map(lambda curve: curve[index])


def rest_motion(batch: int = 1, frames: int = 1, device: torch.device | str = "cpu") -> Motion:
    """The rest pose, mouth shut, eyes open."""
    return Motion(*(torch.zeros(batch, frames, device=device) for _ in fields(Motion)))


@lru_cache(maxsize=16)
def _kernels(device: torch.device) -> dict[str, Tensor]:
    """FIR kernels over time, oldest first; the newest tap sits `FUTURE_FEATURES` (mouth) or 0 (head) ahead."""

    def hann(length: int) -> Tensor:
        return torch.hann_window(length + 2, periodic=False, dtype=torch.float64)[1:-1]

    attack = hann(2 * ATTACK + 1)
    release = torch.cat([hann(2 * RELEASE + 1)[: RELEASE + 1], attack[-ATTACK:]])  # a longer tail into the past
    length = PAST_FEATURES - ATTACK - RELEASE  # the head follows smoothed curves, whose window adds to its own
    age = torch.arange(length, dtype=torch.float64).flip(0) / length  # 1 oldest ... 0 now
    taper = hann(length)
    nod = taper * torch.sin(2 * math.pi * age)
    turn = taper * torch.cos(3 * math.pi * age)
    turn = turn - taper * (turn.sum() / taper.sum())
    kernels = {
        "attack": attack / attack.sum(),
        "release": release / release.sum(),
        "nod": nod / nod.abs().sum(),
        "turn": turn / turn.abs().sum(),
        "blink": torch.sin(math.pi * (torch.arange(BLINK, dtype=torch.float64) + 0.5) / BLINK).clamp(max=0.9) / 0.9,
    }
    return {name: kernel.float().to(device) for name, kernel in kernels.items()}


def _filter(curve: Tensor, kernel: Tensor, future: int = 0) -> Tensor:
    """FIR filter [B, T] -> [B, T]; zeros outside; the last tap of `kernel` reads `future` steps ahead."""
    padded = F.pad(curve, (kernel.numel() - 1 - future, future))
    return F.conv1d(padded[:, None], kernel[None, None])[:, 0]


def _smooth(curve: Tensor, kernels: dict[str, Tensor]) -> Tensor:
    """Co-articulation: quick to rise, slow to fall."""
    rise = _filter(curve, kernels["attack"], ATTACK)
    fall = _filter(curve, kernels["release"], ATTACK)
    return torch.maximum(rise, fall)


def _band_db(power: Tensor, band: tuple[float, float]) -> Tensor:
    return 10.0 * torch.log10(power[..., band_mask(*band, power.shape[-1])].sum(-1))


def _blinks(raw: Tensor, kernels: dict[str, Tensor]) -> Tensor:
    """A blink where a phrase of speech has just given way to a pause: [B, T50] -> closure [B, T50]."""
    voiced = F.pad((raw > VOICED).float(), (PHRASE + PAUSE, 0))
    windows = voiced.unfold(-1, PHRASE + PAUSE, 1)[:, 1:]  # [B, T50, PHRASE + PAUSE], the last is now
    spoken = windows[..., :PHRASE].mean(-1) > 0.5
    ended = (windows[..., PHRASE - 1] > 0) & (windows[..., PHRASE:].sum(-1) == 0)
    return _filter((spoken & ended).float(), kernels["blink"].flip(0)).clamp(max=1.0)


def motion_from_features(features: Tensor) -> Motion:
    """Levelled log-mel [B, T50, n_mels] (`levelled_log_mel`) -> curves [B, T50 // 2].

    Features before the first and after the last count as silence.
    """
    kernels = _kernels(features.device)
    relative = (features.float() - 1.0) * (FEATURE_RANGE / 2.0)  # dB against the level
    power = 10.0 ** (relative / 10.0)
    loudness = _band_db(power, VOWEL_BAND)  # [B, T50]
    shut, wide = (10.0 ** (db / COMPRESSION) for db in (SHUT_DB, OPEN_DB))
    raw = ((10.0 ** (loudness / COMPRESSION) - shut) / (wide - shut)).clamp(0.0, 1.0)
    raw = F.pad(raw, (ATTACK, 0))  # the mouth moves this long before the first sound
    openness = _smooth(raw, kernels)

    balance = _band_db(power, SPREAD_BAND) - _band_db(power, ROUND_BAND)
    spread = F.pad(torch.tanh((balance + 14.0) / 9.0), (ATTACK, 0)) * (raw / 0.3).clamp(max=1.0)
    width = _filter(spread, kernels["attack"], ATTACK)

    pitch = NOD * torch.tanh(3.0 * _filter(openness, kernels["nod"]))
    yaw = TURN * torch.tanh(3.0 * _filter(openness, kernels["turn"]))
    roll = TILT * torch.tanh(2.5 * _filter(width, kernels["nod"]))
    blink = _blinks(raw, kernels)

    def at_video_rate(curve: Tensor) -> Tensor:
        curve = curve[:, ATTACK:]
        frames = curve.shape[-1] // FEATURES_PER_VIDEO_FRAME
        return curve[:, : frames * FEATURES_PER_VIDEO_FRAME].unflatten(-1, (frames, FEATURES_PER_VIDEO_FRAME)).mean(-1)

    yaw, pitch = at_video_rate(yaw), at_video_rate(pitch)
    return Motion(
        openness=at_video_rate(openness),
        width=at_video_rate(width),
        blink=at_video_rate(blink),
        yaw=yaw,
        pitch=pitch,
        roll=at_video_rate(roll),
        gaze_x=-0.7 * yaw / TURN,  # the eyes stay on the viewer while the head turns
        gaze_y=-0.6 * pitch / NOD,
    )


def motion_from_audio(wave: Tensor, state: Tensor | None = None) -> Motion:
    """16 kHz mono sound in [-1, 1], [samples] or [B, samples] -> curves [B, samples // 640] at 25 fps.

    `state` is the level that `track_levels` returned for the sound before this one.
    """
    waves = wave[None] if wave.ndim == 1 else wave
    if waves.ndim != 2:
        raise ValueError(f"sound must be [samples] or [B, samples], got {tuple(wave.shape)}")
    whole = waves.shape[-1] // SAMPLES_PER_VIDEO_FRAME
    features, _ = levelled_log_mel(waves, state)
    return motion_from_features(features)[:, :whole]
