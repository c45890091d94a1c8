"""Pictures, sound and video through Pillow and PyAV; no program outside Python is needed.

What is here is imported when it is first used: pictures, and all that only computes, then work without PyAV.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audio import is_silent, iter_audio, peak_dbfs, read_audio
    from .images import read_image, write_image
    from .video import Clip, iter_frames, read_video
    from .writer import VideoWriter

__all__ = [
    "Clip",
    "VideoWriter",
    "is_silent",
    "iter_audio",
    "iter_frames",
    "peak_dbfs",
    "read_audio",
    "read_image",
    "read_video",
    "write_image",
]
HOMES = {
    "Clip": "video",
    "VideoWriter": "writer",
    "is_silent": "audio",
    "iter_audio": "audio",
    "iter_frames": "video",
    "peak_dbfs": "audio",
    "read_audio": "audio",
    "read_image": "images",
    "read_video": "video",
    "write_image": "images",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
