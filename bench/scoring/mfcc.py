"""Mel-frequency cepstral coefficients as SyncNet was trained on (liveavatar.md, 4.4), all in float64.

The formulas are those of python_speech_features' defaults: rectangular frames of 25 ms every 10 ms at 16 kHz, 26
triangles on the mel scale, 13 cepstra, liftered, the first replaced by the log energy.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16000
FRAME, HOP, FFT = 400, 160, 512
FILTERS, CEPSTRA, LIFTER = 26, 13, 22
PRE_EMPHASIS = 0.97
WINDOW_COLUMNS, COLUMNS_PER_FRAME = 20, 4  # SyncNet's audio window; MFCC columns a video frame at 25 fps
EPS = torch.finfo(torch.float64).eps


def mel_filters() -> Tensor:
    """Triangles [26, 257] with corners on whole FFT bins, from 0 Hz to half the sample rate."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    hertz = 700 * (10 ** (torch.linspace(0, top, FILTERS + 2, dtype=torch.float64) / 2595) - 1)
    corner = torch.floor((FFT + 1) * hertz / SAMPLE_RATE)
    low, peak, high = (corner[k : k + FILTERS, None] for k in range(3))
    bins = torch.arange(FFT // 2 + 1, dtype=torch.float64)
    rising = torch.where((low <= bins) & (bins < peak), (bins - low) / (peak - low), 0.0)
    falling = torch.where((peak <= bins) & (bins < high), (high - bins) / (high - peak), 0.0)
    return rising + falling


def dct_matrix() -> Tensor:
    """Orthonormal DCT-II [13, 26]."""
    k = torch.arange(CEPSTRA, dtype=torch.float64)[:, None]
    n = torch.arange(FILTERS, dtype=torch.float64)
    basis = torch.cos(math.pi * k * (2 * n + 1) / (2 * FILTERS)) * math.sqrt(2 / FILTERS)
    basis[0] /= math.sqrt(2)
    return basis


def mfcc(samples: Tensor) -> Tensor:
    """Samples [N] at 16 kHz in int16 range (-32768..32767, any dtype) -> coefficients [13, T] in float64.

    T = 1 + ceil((N - 400) / 160), at least 1; the end is padded with zeros. ValueError when there is no sample.
    """
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"mfcc: needs mono samples [N] with N > 0, got shape {list(samples.shape)}")
    x = samples.cpu().double()
    x = torch.cat((x[:1], x[1:] - PRE_EMPHASIS * x[:-1]))
    frames = 1 + max(0, math.ceil((len(x) - FRAME) / HOP))
    x = F.pad(x, (0, (frames - 1) * HOP + FRAME - len(x)))
    power = torch.fft.rfft(x.unfold(0, FRAME, HOP), FFT).abs().square() / FFT  # [T, 257]
    energy = power.sum(1)
    mel = power @ mel_filters().T  # [T, 26]
    cepstra = mel.where(mel != 0, EPS).log() @ dct_matrix().T  # [T, 13]
    n = torch.arange(CEPSTRA, dtype=torch.float64)
    cepstra = cepstra * (1 + LIFTER / 2 * torch.sin(math.pi * n / LIFTER))
    cepstra[:, 0] = energy.where(energy != 0, EPS).log()
    return cepstra.T


def mfcc_windows(coefficients: Tensor, count: int) -> Tensor:
    """Audio windows [count, 1, 13, 20] of coefficients [13, T]: window v takes columns 4v .. 4v + 19."""
    needed = COLUMNS_PER_FRAME * (count - 1) + WINDOW_COLUMNS
    if count < 1 or needed > coefficients.shape[1]:
        raise ValueError(f"mfcc_windows: {count} windows need {needed} columns, there are {coefficients.shape[1]}")
    windows = coefficients.unfold(1, WINDOW_COLUMNS, COLUMNS_PER_FRAME)[:, :count]  # [13, count, 20]
    return windows.permute(1, 0, 2)[:, None]
