"""What users call: `load` a model, `Avatar.generate` a video or open a `Session` with `Avatar.stream`.

The classes are imported when they are first used: training and the parts of the runtime need neither media nor models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .load import load

if TYPE_CHECKING:
    from .avatar import Avatar, Video
    from .session import Session

__all__ = ["Avatar", "Session", "Video", "load"]
HOMES = {"Avatar": "avatar", "Session": "session", "Video": "avatar"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
