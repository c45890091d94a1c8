"""Published weight files as state dicts, read where they lie; `sources.py` reads them tensor by tensor."""

from pathlib import Path

from torch import Tensor

from .safetensors_header import UnreadableFile
from .sources import open_weights

__all__ = ["UnreadableFile", "read_state"]


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a weight file, or of the shards that a `*.index.json` names, memory-mapped on the CPU.

    A dict under the key `model_state`, `state_dict`, ... is unwrapped (wan.md 1.4). Raises UnreadableFile.
    """
    with open_weights(path) as weights:
        return {name: weights.map(name) for name in weights}
