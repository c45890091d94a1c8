"""What lies in a folder."""

from pathlib import Path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
