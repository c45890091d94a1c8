"""Published weight files, read where they lie: `.pth`, `.pt`, `.bin` without running pickles; safetensors; shards."""

import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TORCH_ENDINGS = (".pth", ".pt", ".bin")


class UnreadableFile(ValueError):
    """A weight file that is missing, damaged, or holds something else than tensors."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a weight file, or of the shards that a `*.index.json` names, memory-mapped on the CPU.

    A dict under the key `model_state` or `state_dict` is unwrapped (wan.md 1.4). Raises UnreadableFile.
    """
    path = Path(path)
    if not path.is_file():
        raise UnreadableFile(f"{path} is not there; check the path, or download the file again")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_ENDINGS:
        return _read_torch(path)
    raise UnreadableFile(f"{path}: unknown ending; expected .safetensors, .index.json, {', '.join(TORCH_ENDINGS)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise UnreadableFile(f"{path} is damaged ({error}); download it again") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        table: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableFile(f"{index} is no index of shards ({error}); download it again") from error
    state: dict[str, Tensor] = {}
    for shard in dict.fromkeys(table.values()):
        state.update(read_state(index.parent / shard))
    absent = [key for key in table if key not in state]
    if absent:
        raise UnreadableFile(f"{index} promises tensors that no shard holds: {', '.join(absent[:12])}")
    return state


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnreadableFile(
            f"{path} holds Python objects beside tensors, which are never executed; save its state dict alone, "
            "or as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise UnreadableFile(f"{path} is damaged ({error}); download it again") from error
    for key in ("model_state", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UnreadableFile(f"{path} holds no plain state dict (name -> tensor)")
    return content
