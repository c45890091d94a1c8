"""What a checkpoint is, wherever it lies: the facts behind `kinora inspect`."""

from dataclasses import replace
from pathlib import Path

from ..checkpoints_tools.inspect import FileReport, Report, describe, inspect_path
from ..checkpoints_tools.locate import NotFound, locate
from ..checkpoints_tools.read import UnreadableFile
from ..checkpoints_tools.sources import open_weights
from .errors import CheckpointError
from .load import TINY_FOLDER
from .systems.embedded import CONFIG_FILE, WEIGHTS_FILE, read_config


def inspect_checkpoint(checkpoint: str) -> Report:
    """The report of a file, a folder, a repository in the Hub's cache, or the embedded model `tiny`.

    Reads headers alone. Raises CheckpointError when there is no such place or no weight file in it.
    """
    try:
        path = TINY_FOLDER if checkpoint == "tiny" else locate(checkpoint, download=False)
        if (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file():
            return Report((_embedded(path),), {})
        return inspect_path(path)
    except (NotFound, UnreadableFile) as error:
        raise CheckpointError(str(error)) from error


def _embedded(folder: Path) -> FileReport:
    """A folder that `python -m kinora.train.tiny` wrote: its tensors are those that its configuration asks for."""
    _, *networks = read_config(folder / CONFIG_FILE)
    parts = zip(("dit", "vae", "speech"), networks, strict=True)
    wanted = {f"{part}.{key}": tuple(v.shape) for part, net in parts for key, v in net.state_dict().items()}
    try:
        with open_weights(folder / WEIGHTS_FILE) as weights:
            found = describe(WEIGHTS_FILE, weights, None)
            shapes = {name: entry.shape for name, entry in weights.items()}
    except UnreadableFile as error:
        return FileReport(WEIGHTS_FILE, trouble=str(error))
    return replace(
        found,
        what="a small LiveAvatar: transformer, VAE and speech encoder",
        missing=tuple(name for name in wanted if name not in shapes),
        unexpected=tuple(name for name in shapes if name not in wanted),
        misshaped=tuple(
            f"{name} {list(shape)}, expected {list(wanted[name])}"
            for name, shape in shapes.items()
            if name in wanted and shape != wanted[name]
        ),
    )
