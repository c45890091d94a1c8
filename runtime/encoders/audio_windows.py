"""Hidden states of speech at 50 Hz -> features per video frame (wan.md 2.5.5, 2.5.6; liveavatar.md 3.3).

Shapes: K hidden states, T50 encoder frames, A frames at the interpolated rate (30 Hz), C channels, n video frames.
The float64 expressions decide which frame is taken; integer arithmetic would not give the same indices at 20 fps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_RATE = 50  # encoder frames a second
WINDOW_RATE = 30  # rate that windows are taken from


def interpolated_length(frames: int, rate: float = WINDOW_RATE, feature_rate: float = FEATURE_RATE) -> int:
    """Frames at `rate` of `frames` encoder frames (not of the duration)."""
    return int(frames / feature_rate * rate)


def resample_time(x: Tensor, length: int) -> Tensor:
    """[..., T, C] -> [..., length, C], linear with both ends aligned, in the dtype of x."""
    if x.shape[-2] == 0 or length < 1:
        raise ValueError(f"cannot resample {x.shape[-2]} frames to {length}; the sound is too short")
    flat = x.reshape(-1, *x.shape[-2:]).transpose(1, 2)  # [N, C, T]
    flat = F.interpolate(flat, size=length, mode="linear", align_corners=True)
    return flat.transpose(1, 2).reshape(*x.shape[:-2], length, x.shape[-1])


def frame_indices(source_fps: float, source_frames: int, target_fps: float, count: int) -> np.ndarray:
    """Source frame of each of `count` frames at `target_fps`: nearest in time, ties to even, int64 [count]."""
    times = np.linspace(0, count / target_fps, count, endpoint=False)
    return np.clip(np.round(times * source_fps), 0, source_frames - 1).astype(np.int64)


def clip_count(frames: int, fps: float, batch_frames: int, rate: float = WINDOW_RATE) -> int:
    """Clips of `batch_frames` video frames for `frames` frames at `rate`; the last one may hold zeros alone."""
    return int(frames / (batch_frames * (rate / fps))) + 1


def _gather(features: Tensor, centres: np.ndarray, m: int, step: int) -> Tensor:
    """[K, A, C] -> [n, K, (2m+1) C]: frames centre - m step .. centre + m step, clamped; zeros where centre >= A."""
    total = features.shape[1]
    offsets = np.arange(-m, m + 1) * step
    taken = np.clip(centres[:, None] + offsets, 0, total - 1)  # [n, 2m+1]
    device = features.device
    windows = features[:, torch.from_numpy(taken).to(device)]  # [K, n, 2m+1, C]
    windows = windows.permute(1, 0, 2, 3).flatten(2)  # [n, K, (2m+1) C]
    return windows.masked_fill(torch.from_numpy(centres >= total).to(device)[:, None, None], 0.0)


def _check(features: Tensor, batch_frames: int, m: int) -> None:
    if features.ndim != 3 or features.shape[1] == 0:
        raise ValueError(f"expected features [K, A, C] with A >= 1, got {list(features.shape)}")
    if batch_frames < 1 or m < 0:
        raise ValueError(f"batch_frames must be positive and m not negative, got {batch_frames} and {m}")


def bucket_by_fps(
    features: Tensor, fps: float, batch_frames: int, m: int = 0, rate: float = WINDOW_RATE
) -> tuple[Tensor, int]:
    """Windows for whole clips at any frame rate: [K, A, C] at `rate` -> ([n, K, (2m+1) C], clips).

    n = clips * batch_frames. With K = 1 the layer axis is dropped. Frames after the end of the sound are zeros.
    """
    _check(features, batch_frames, m)
    if not 0 < fps <= rate:
        raise ValueError(f"fps must lie in (0, {rate}], got {fps}")
    total = features.shape[1]
    clips = clip_count(total, fps, batch_frames, rate)
    count = clips * batch_frames
    padded = max(math.ceil(count / fps * rate), total)
    centres = frame_indices(rate, padded, fps, count)
    windows = _gather(features, centres, m, int(rate / fps))
    return (windows[:, 0] if windows.shape[1] == 1 else windows), clips


def bucket_by_stride(features: Tensor, stride: int = 2, batch_frames: int = 12, m: int = 2) -> tuple[Tensor, int]:
    """Windows at every `stride`-th frame: [K, A, C] -> ([n, K, (2m+1) C], clips); positions of a window lie 2 apart."""
    _check(features, batch_frames, m)
    if stride < 1:
        raise ValueError(f"stride must be positive, got {stride}")
    clips = int(features.shape[1] / (batch_frames * stride)) + 1
    windows = _gather(features, stride * np.arange(clips * batch_frames), m, 2)
    return (windows[:, 0] if windows.shape[1] == 1 else windows), clips


def omniavatar_features(states: Sequence[Tensor]) -> Tensor:
    """States [B, T, C] each -> [B, T, (K+1) C]: the last one, then all in order (it appears twice)."""
    return torch.cat([states[-1], *states], -1)


def skyreels_features(states: Sequence[Tensor]) -> Tensor:
    """States [1, T, C] each -> [T, K-1, C]: every layer's output, without the encoder's input."""
    return torch.stack([state[0] for state in states[1:]], 1)


def s2v_features(states: Sequence[Tensor], rate: float = WINDOW_RATE) -> Tensor:
    """States [1, T50, C] each, at the encoder's own rate -> [K, A, C] at `rate`, in the dtype of the states."""
    stacked = torch.cat(list(states))  # [K, T50, C]
    return resample_time(stacked, interpolated_length(stacked.shape[1], rate))


@dataclass(frozen=True)
class AudioClips:
    """LiveAvatar's audio condition: `features` [speakers, K, (2m+1) C, clips * batch_frames] and the clip count."""

    features: Tensor
    clips: int


def liveavatar_windows(
    features: Tensor, fps: float = 25, batch_frames: int = 48, m: int = 0, rate: float = WINDOW_RATE
) -> AudioClips:
    """[K, A, C] at `rate` -> the model layout [1, K, (2m+1) C, n], float32 (liveavatar.md 3.3)."""
    windows, clips = bucket_by_fps(features.float(), fps, batch_frames, m, rate)
    if features.shape[0] == 1:
        windows = windows[:, None]
    return AudioClips(windows.permute(1, 2, 0)[None], clips)


def join_speakers(speakers: Sequence[AudioClips]) -> AudioClips:
    """Several speakers, each windowed alone, cut to the shortest and stacked on the first axis."""
    if not speakers:
        raise ValueError("no speaker; pass the windows of at least one sound")
    shortest = min(speaker.features.shape[-1] for speaker in speakers)
    features = torch.cat([speaker.features[..., :shortest] for speaker in speakers])
    return AudioClips(features, min(speaker.clips for speaker in speakers))
