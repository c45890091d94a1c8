"""Speech features at 50 Hz, shared by the tiny model's audio front end and by the drawn world's motion driver.

The grid is fixed: frame k is centred at (k + 0.5) * 20 ms and reads 40 ms of sound, so a frame needs 160 samples
(10 ms) after its own 20 ms. Powers are mean squares, so a full-scale sine reads -3 dB.

The level tracker is an automatic gain: the level jumps to every new peak of speech-band loudness, falls by
`LEVEL_DECAY` a frame otherwise, and never below `LEVEL_FLOOR`, so that real silence stays silent:

    level[t] = max(floor, max over s <= t of (loudness[s] - decay * (t - s)))

Loudness is rounded to 1/1024 dB and the decay is a multiple of it, so the closed form is exact in float64 and
streaming in chunks of any size gives the very same levels as the whole file.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16_000
HOP = 320  # samples: 20 ms
WINDOW = 640  # samples: 40 ms
MARGIN = (WINDOW - HOP) // 2  # samples that a frame reads beyond its hop, on each side
N_MELS = 40
MEL_RANGE = (60.0, 7600.0)  # Hz
SPEECH_BAND = (150.0, 5000.0)  # Hz
SILENCE_DB = -100.0
LEVEL_FLOOR = -40.0  # dB
LEVEL_DECAY = 123 / 1024  # dB a frame, 6 dB a second
FEATURE_RANGE = 60.0  # dB below the level that the features resolve


def _hz_to_mel(hertz: float) -> float:
    return 2595.0 * math.log10(1.0 + hertz / 700.0)


@lru_cache(maxsize=4)
def mel_centres(n_mels: int = N_MELS) -> tuple[float, ...]:
    """Centre frequency of every mel band in Hz (HTK scale, `MEL_RANGE`)."""
    low, high = (_hz_to_mel(hertz) for hertz in MEL_RANGE)
    mels = [low + (high - low) * band / (n_mels + 1) for band in range(n_mels + 2)]
    return tuple(700.0 * (10.0 ** (mel / 2595.0) - 1.0) for mel in mels[1:-1])


@lru_cache(maxsize=8)
def _filterbank(n_mels: int, device: torch.device) -> Tensor:
    """Triangles that sum to one between the outer centres: [WINDOW / 2 + 1, n_mels]."""
    with torch.inference_mode(False):  # kept for ever, so usable in training too
        low, high = (_hz_to_mel(hertz) for hertz in MEL_RANGE)
        mels = torch.linspace(low, high, n_mels + 2, dtype=torch.float64)
        edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
        hertz = torch.arange(WINDOW // 2 + 1, dtype=torch.float64)[:, None] * (SAMPLE_RATE / WINDOW)
        rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
        return torch.minimum(rising, falling).clamp(min=0.0).float().to(device)


def band_mask(low: float, high: float, n_mels: int = N_MELS) -> list[int]:
    """Indices of the mel bands whose centre lies in [low, high] Hz."""
    return [band for band, centre in enumerate(mel_centres(n_mels)) if low <= centre <= high]


def frame_count(samples: int) -> int:
    """Frames of the 50 Hz grid that `samples` samples begin."""
    return -(-samples // HOP)


def frame_energies(wave: Tensor, *, n_mels: int = N_MELS, padded: bool = False) -> Tensor:
    """Mel-band powers (mean squares): [..., samples] -> [..., T50, n_mels], T50 = ceil(samples / 320).

    Zeros stand before the start and after the end. With `padded` the caller passes the `MARGIN` samples on both
    sides itself (streaming), samples = 320 * (T50 + 1), and no zeros are added.
    """
    if not wave.is_floating_point():
        raise TypeError(f"sound must be floating point in [-1, 1], got {wave.dtype}; divide int16 by 32768")
    if padded:
        if wave.shape[-1] < WINDOW or wave.shape[-1] % HOP:
            raise ValueError(f"padded sound must be a multiple of {HOP} samples, at least {WINDOW}, got {wave.shape}")
    else:
        frames = frame_count(wave.shape[-1])
        wave = F.pad(wave, (MARGIN, frames * HOP - wave.shape[-1] + MARGIN))
        if frames == 0:
            return wave.new_zeros(*wave.shape[:-1], 0, n_mels)
    window = torch.hann_window(WINDOW, device=wave.device)
    frames_tw = wave.float().unfold(-1, WINDOW, HOP) * window  # [..., T50, WINDOW]
    spectrum = torch.fft.rfft(frames_tw).abs().square() * (2.0 / (WINDOW * window.square().sum()))
    return spectrum @ _filterbank(n_mels, wave.device)  # [..., T50, n_mels]


def decibels(power: Tensor) -> Tensor:
    """10 log10, never below `SILENCE_DB`."""
    return 10.0 * torch.log10(power.clamp(min=10.0 ** (SILENCE_DB / 10.0)))


def speech_loudness(energies: Tensor) -> Tensor:
    """Loudness in the speech band in dB: [..., T50, n_mels] powers -> [..., T50]."""
    return decibels(energies[..., band_mask(*SPEECH_BAND, energies.shape[-1])].sum(-1))


def track_levels(loudness: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Levels in dB of [..., T50] loudness, and the state for the next chunk.

    `state` [...] (float64) is the level at the last frame of the previous chunk; None starts at the floor.
    """
    frames = loudness.shape[-1]
    exact = (loudness.double() * 1024.0).round() / 1024.0
    if state is None:
        state = exact.new_full(loudness.shape[:-1], LEVEL_FLOOR)
    if frames == 0:
        return loudness, state
    decay = LEVEL_DECAY * torch.arange(1, frames + 1, device=loudness.device, dtype=torch.float64)
    peaks = torch.cummax(exact + decay, -1).values
    levels = (torch.maximum(peaks, state[..., None]) - decay).clamp(min=LEVEL_FLOOR)
    return levels.to(loudness.dtype), levels[..., -1]


def levelled_log_mel(
    wave: Tensor, state: Tensor | None = None, *, n_mels: int = N_MELS, padded: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-mel relative to the tracked level, in [-1, 1]: [..., samples] -> ([..., T50, n_mels], state).

    1 is a band at the level, -1 is `FEATURE_RANGE` dB below it or less (so digital silence is all -1).
    """
    energies = frame_energies(wave, n_mels=n_mels, padded=padded)
    levels, state = track_levels(speech_loudness(energies), state)
    relative = decibels(energies) - levels[..., None]
    return (1.0 + relative * (2.0 / FEATURE_RANGE)).clamp(-1.0, 1.0), state
