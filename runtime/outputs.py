"""Whether something can be written, found out before minutes of other work."""

import os
from pathlib import Path

from .errors import OutputError


def check_file(path: Path) -> None:
    """Raises OutputError when the file exists and may not be written, or cannot be made; nothing is touched."""
    if not os.path.exists(path):  # where pathlib raises in folders that may not be searched
        check_folder(path.parent)
    elif not os.access(path, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission; give it another name, or make it writable")


def check_folder(folder: Path) -> None:
    """Raises OutputError when files cannot be made in the folder, or it cannot be made; nothing is touched."""
    place = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    if not os.path.isdir(place):
        raise OutputError(f"cannot write into {folder}: {place} is no folder; give another one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {folder}: no permission; give another folder, or make it writable")
