"""Checkpoint errors of the encoders, in one place: which file, what was wrong, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ...checkpoints_tools.assign import KeyMismatch
from ...checkpoints_tools.read import UnreadableFile, read_state
from ..errors import CheckpointError


@contextmanager
def read_checkpoint(path: str | Path) -> Iterator[dict[str, Tensor]]:
    """The state dict of a file; trouble while reading or assigning it becomes a CheckpointError that names the file."""
    try:
        yield read_state(path)
    except UnreadableFile as error:
        raise CheckpointError(str(error)) from error
    except KeyMismatch as error:
        raise CheckpointError(f"{path}: {error}") from error


def find_weights(folder: str | Path) -> Path:
    """The weight file in a folder laid out as on the Hugging Face hub, or the path itself when it is a file."""
    folder = Path(folder)
    if folder.is_file():
        return folder
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds none of {', '.join(names)}; pass the folder of the downloaded model")
