"""Weight files opened without reading their tensors: names, dtypes, shapes and places; then tensor by tensor.

Safetensors are read by their place in the file, without a mapping, so that nothing but the bytes asked for is ever in
memory; `.pth` files are unpickled with `weights_only=True` over a memory map, which holds no bytes either.
"""

import json
import mmap
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .safetensors_header import Entry, UnreadableFile, read_header

TORCH_ENDINGS = (".pth", ".pt", ".bin", ".model", ".ckpt")
INDEX_ENDING = ".index.json"
WRAPPERS = ("model_state", "state_dict", "model_state_dict", "model", "module")
SHOWN = 12
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how the two forms of torch.save begin


class Weights(Mapping[str, Entry]):
    """The tensors of one or several files by name. No file stays open; as a context manager it forgets its maps.

    `map(name)` is the tensor over mapped memory (nothing is copied; do not write to it), `read(name)` a copy of its
    own, `read_into` its raw bytes into memory of yours; all may be called from several threads.
    """

    def __init__(self, entries: dict[str, Entry], held: Mapping[str, Tensor] | None = None):
        self._entries = entries
        self._held = held or {}  # tensors of files that have no plain places
        self._maps: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of mapped files; tensors over them stay valid."""
        self._maps.clear()
        self._held = {}

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(dict.fromkeys(entry.file for entry in self._entries.values()))

    def meta(self) -> dict[str, Tensor]:
        """Every tensor on the meta device: dtype and shape alone."""
        return {k: torch.empty(e.shape, dtype=e.dtype, device="meta") for k, e in self._entries.items()}

    def in_file_order(self) -> list[str]:
        """The names in the order in which their bytes lie on the disk."""
        files = {file: place for place, file in enumerate(self.files)}
        return sorted(self._entries, key=lambda k: (files[self._entries[k].file], self._entries[k].offset or 0))

    def map(self, name: str) -> Tensor:
        """The tensor over mapped memory; a copy where the file keeps it at a place that its dtype cannot start at."""
        entry = self._entries[name]
        if entry.offset is None:
            return self._held[name]
        if entry.count == 0 or entry.offset % entry.dtype.itemsize:
            return self.read(name)
        if entry.file not in self._maps:  # copy-on-write: a stray write never reaches the file
            with entry.file.open("rb") as file:
                self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._maps[entry.file], dtype=entry.dtype, count=entry.count, offset=entry.offset)
        return flat.view(entry.shape)

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own."""
        entry = self._entries[name]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self.read_into(name, 0, raw)
        return raw.view(entry.dtype).view(entry.shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Bytes [start, start + len(out)) of a tensor into `out`, uint8 on the CPU. UnreadableFile when they end."""
        entry = self._entries[name]
        if entry.offset is None:
            held = self._held[name].contiguous().view(-1).view(torch.uint8)
            out.copy_(held[start : start + out.numel()])
            return
        view, done = memoryview(out.numpy().data), 0
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset + start)
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise UnreadableFile(f"{entry.file} ended inside {name}; it was cut while it was read")
                done += got


def open_weights(path: str | Path) -> Weights:
    """The tensors of a weight file, or of the shards that a `*.index.json` names. Raises UnreadableFile.

    A dict under one key of `WRAPPERS` is unwrapped (wan.md 1.4, latentsync.md 1).
    """
    path = Path(path)
    if not path.is_file():
        raise UnreadableFile(f"{path} is not there; check the path, or download the file again")
    if path.name.endswith(INDEX_ENDING):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return Weights(read_header(path))
    if path.suffix in TORCH_ENDINGS:
        state = _load_pickle(path)
        return Weights({k: Entry(path, v.dtype, tuple(v.shape)) for k, v in state.items()}, state)
    known = ", ".join((".safetensors", INDEX_ENDING, *TORCH_ENDINGS))
    raise UnreadableFile(f"{path}: unknown ending; expected one of {known}")


def open_files(paths: list[Path]) -> Weights:
    """The tensors of several files as one, for folders whose files have no index. Raises UnreadableFile."""
    return _join([open_weights(path) for path in paths])


def _join(parts: list[Weights]) -> Weights:
    entries: dict[str, Entry] = {}
    held: dict[str, Tensor] = {}
    for part in parts:
        if twice := entries.keys() & part.keys():
            name = min(twice)
            raise UnreadableFile(
                f"{name} is in {entries[name].file} and in {part[name].file}; "
                "keep the files of one download alone in their folder"
            )
        entries.update(part)
        held.update(part._held)
    return Weights(entries, held)


def _open_shards(index: Path) -> Weights:
    try:
        table: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = [index.parent / shard for shard in dict.fromkeys(table.values())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableFile(
            f"{index} is no index of shards ({type(error).__name__}: {error}); download it again"
        ) from error
    outside = [name for name in table.values() if Path(name).name != name or name.endswith(".json")]
    if outside:
        raise UnreadableFile(
            f"{index} names {outside[0]!r}, which is no weight file beside it; download the index again"
        )
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise UnreadableFile(
            f"{index} names {len(shards)} shards, of which {_listed(absent)} are not there; download them"
        )
    weights = _join([open_weights(shard) for shard in shards])
    wrong = [
        f"{key} ({shard})" for key, shard in table.items() if key not in weights or weights[key].file.name != shard
    ]
    if wrong:
        raise UnreadableFile(
            f"{index} promises tensors that no shard holds where it says: {_listed(wrong)}; download the shards again"
        )
    return weights


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _load_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(4)
    try:
        zipped = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error
    if not zipped and start[:1] != PICKLE:
        what = (
            "the directory at the end of the zip archive is missing" if start == ZIP else "it is no file of torch.save"
        )
        raise UnreadableFile(f"{path} is damaged: {what} ({path.stat().st_size:,} bytes); download it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise _damaged(path, error) from error
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UnreadableFile(
            f"{path} holds Python objects{f' ({found[1]})' if found else ''} beside tensors, which are never executed; "
            "on a machine where you trust it, save its state dict alone: "
            "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        ) from error
    except OSError:
        raise
    except Exception as error:  # damage makes the unpickler fail in any way: IndexError, struct.error, ...
        raise _damaged(path, error) from error
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UnreadableFile(f"{path} holds no plain state dict (name -> tensor)")
    for key, value in content.items():
        if not isinstance(key, str):
            raise UnreadableFile(f"{path} names a tensor {key!r}, which is no text; save a state dict (name -> tensor)")
        if what := _unusual(value):
            raise UnreadableFile(f"{path}: {key} is {what}; save it as a plain dense tensor of real numbers")
    return content


def _damaged(path: Path, error: Exception) -> UnreadableFile:
    return UnreadableFile(f"{path} is damaged ({type(error).__name__}: {error}); download it again")


def _unusual(value: Tensor) -> str:
    """In what way a tensor is none of plain bytes in memory; empty when it is."""
    if value.is_quantized:
        return "quantised by torch"
    if value.layout is not torch.strided:
        return f"of the layout {value.layout}"
    if value.is_meta:
        return "on the meta device, without values"
    return "complex" if value.is_complex() else ""
