"""Offset and confidence of lip sync from SyncNet embeddings (liveavatar.md, 4.4): Sync-C and Sync-D."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

MAX_SHIFT = 15  # video frames searched either way
PAIR_EPS = 1e-6


@dataclass(frozen=True)
class SyncScore:
    """`offset` in video frames (by how many the sound is late), `confidence` Sync-C, `distance` Sync-D."""

    offset: int
    confidence: float
    distance: float


def shift_distances(video: Tensor, audio: Tensor, max_shift: int = MAX_SHIFT) -> Tensor:
    """Mean distance [2 * max_shift + 1] between video and audio embeddings [V, C], for shifts -max_shift..max_shift.

    Video v meets audio v + shift; beyond its ends the audio is zero vectors, which count.
    """
    if video.shape != audio.shape or video.ndim != 2 or not len(video):
        raise ValueError(
            f"sync: needs as many video as audio embeddings [V, C], got {list(video.shape)} and {list(audio.shape)}"
        )
    padded = F.pad(audio, (0, 0, max_shift, max_shift))
    windows = padded.unfold(0, 2 * max_shift + 1, 1).transpose(1, 2)  # [V, shifts, C]
    return F.pairwise_distance(video[:, None], windows, eps=PAIR_EPS).mean(0)


def sync_score(distances: Tensor) -> SyncScore:
    """Score of the mean distances by shift: the deepest valley, and its depth below the median."""
    best = int(distances.argmin())
    lowest = distances[best]
    return SyncScore(
        offset=len(distances) // 2 - best, confidence=float(distances.median() - lowest), distance=float(lowest)
    )
