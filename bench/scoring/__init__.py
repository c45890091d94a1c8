"""Lip-sync scoring as the avatar papers report it: Sync-C, Sync-D and the offset of SyncNet v2."""

from .clip import score_clip
from .sync import SyncScore, shift_distances, sync_score

__all__ = ["SyncScore", "score_clip", "shift_distances", "sync_score"]
