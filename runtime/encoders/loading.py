"""Weight files opened for a model, with errors in one place: which file, what was wrong, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...checkpoints_tools.assign import KeyMismatch
from ...checkpoints_tools.read import UnreadableFile
from ...checkpoints_tools.sources import Weights, open_weights
from ..errors import CheckpointError


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[Weights]:
    """A weight file or an index of shards, open while it is loaded from.

    Trouble while reading or assigning it becomes a CheckpointError that names the file.
    """
    try:
        with open_weights(path) as weights:
            yield weights
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
