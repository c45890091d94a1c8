"""Pictures, sound and video through Pillow and PyAV; no program outside Python is needed."""

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
