"""What the weight files of a folder are: system, size, precision, and which tensors are missing or too many.

Only headers are read. Nothing is guessed: what is like nothing that is known is said to be so.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .assign import MISFIT
from .bundle.format import INDEX_FILE, WEIGHTS_ENDING, BundleError, parse_file
from .bundle.layout import PAD, PART_KEY, SCALE_ENDING
from .published.catalogue import ALSO, SYSTEMS
from .published.identify import Adapters, Match, identify
from .safetensors_header import read_metadata
from .sources import INDEX_ENDING, TORCH_ENDINGS, UnreadableFile, Weights, open_files, open_weights

ENDINGS = (".safetensors", *TORCH_ENDINGS)
SHARD = re.compile(r"(?P<stem>.+)-(?P<place>\d+)-of-(?P<count>\d+)(?P<ending>\.\w+)")
DEEPEST = 3  # folders below the one that is inspected
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state).*")


@dataclass(frozen=True)
class FileReport:
    """One file, or the shards of one, and what it is.

    `what` is empty for tensors that are like nothing that is known; `trouble` says why a file could not be read, and
    then nothing else is known of it. `part`: its name in the catalogue. `compared`: whether there is anything that says
    which tensors it should have.
    """

    name: str
    what: str = ""
    part: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    trouble: str = ""
    bytes: int = 0
    tensors: int = 0
    parameters: int = 0
    dtypes: dict[torch.dtype, int] = field(default_factory=dict)  # tensors of each
    shards: int = 1
    compared: bool = True

    @property
    def complete(self) -> bool:
        """Whether it is known, and was compared and has every tensor that it should and no other."""
        wrong = self.missing or self.unexpected or self.misshaped or self.trouble
        return bool(self.what) and self.compared and not wrong

    @property
    def differences(self) -> dict[str, tuple[str, ...]]:
        """What is wrong with its tensors -> their names."""
        found = {"missing": self.missing, "unexpected": self.unexpected, MISFIT: self.misshaped}
        return {wrong: names for wrong, names in found.items() if names}

    @property
    def precision(self) -> str:
        """The dtypes and how many tensors have them, the most frequent first."""
        shown = sorted(self.dtypes.items(), key=lambda item: -item[1])
        return ", ".join(f"{str(dtype).removeprefix('torch.')} x {count}" for dtype, count in shown)


@dataclass(frozen=True)
class Report:
    """Every weight file below a path, and of the systems whose own part is there the parts that are not."""

    files: tuple[FileReport, ...]
    systems: dict[str, tuple[str, ...]]

    @property
    def complete(self) -> bool:
        return bool(self.files) and all(file.complete for file in self.files)


def inspect_path(path: Path) -> Report:
    """Look at a weight file, an index, or every weight file in a folder. Raises UnreadableFile when there is none.

    A shard stands for all shards of its file.
    """
    groups = [_beside(path)] if path.is_file() else _groups(path)
    files = [_report(name, group) for name, group in groups]
    if not files:
        raise UnreadableFile(f"{path} holds no weight files ({', '.join(ENDINGS)}); pass the folder of a checkpoint")
    return Report(tuple(files), _systems(files))


def _beside(file: Path) -> tuple[str, list[Path]]:
    """(name, files) of what a file is loaded with: itself, or all shards that lie beside it."""
    shard = SHARD.fullmatch(file.name)
    if not shard:
        return file.name, [file]
    alike = re.compile(re.escape(shard["stem"]) + rf"-\d+-of-{shard['count']}" + re.escape(shard["ending"]))
    return f"{shard['stem']}{shard['ending']}", sorted(f for f in file.parent.iterdir() if alike.fullmatch(f.name))


def _groups(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(name, files) of everything that is loaded as one: an index and its shards, shards without one, single files."""
    below = [f for f in sorted(folder.rglob("*")) if len(f.relative_to(folder).parts) <= DEEPEST + 1 and f.is_file()]
    below = [f for f in below if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    indexes = [f for f in below if f.name.endswith(INDEX_ENDING)]
    for index in indexes:
        yield index.relative_to(folder).as_posix(), [index]
    indexed = {(index.parent, index.name.removesuffix(INDEX_ENDING)) for index in indexes}
    shards: dict[tuple[Path, str], list[Path]] = {}
    for file in below:
        if file.suffix not in ENDINGS or NO_WEIGHTS.fullmatch(file.name):
            continue
        if shard := SHARD.fullmatch(file.name):
            key = file.parent, f"{shard['stem']}{shard['ending']}"
            if key not in indexed:
                shards.setdefault(key, []).append(file)
        else:
            yield file.relative_to(folder).as_posix(), [file]
    for (parent, name), files in shards.items():
        yield (parent / name).relative_to(folder).as_posix(), files


def _report(name: str, files: list[Path]) -> FileReport:
    try:
        _check_count(files)
        if len(files) == 1 and files[0].suffix == ".safetensors" and (part := read_metadata(files[0]).get(PART_KEY)):
            return _bundle_part(name, files[0], part)
        with open_files(files) if len(files) > 1 else open_weights(files[0]) as weights:
            return describe(name, weights, identify({key: entry.shape for key, entry in weights.items()}))
    except UnreadableFile as error:
        return FileReport(name, trouble=str(error))


def _bundle_part(name: str, file: Path, part: str) -> FileReport:
    """A weight file of a bundle: what fills the space between tensors is none, and scales belong to their weights.

    It is compared with the index beside it; without one, with what is published. It is complete as a file of its own;
    of its system it says nothing, whose other parts are in other layouts.
    """
    with open_weights(file) as weights:
        held = Weights({key: entry for key, entry in weights.items() if not key.startswith(PAD)})
    shapes = {
        key: entry.shape
        for key, entry in held.items()
        if not (key.endswith(SCALE_ENDING) and key.removesuffix(SCALE_ENDING) in held)
    }
    match = identify(shapes)
    found = describe(name, held, match)
    found = replace(found, what=f"part {part} of a bundle" + (f": {found.what}" if found.what else ""), part="")
    if (index := file.with_name(INDEX_FILE)).is_file():
        found = _against_index(found, held, index, part)
    else:
        found = replace(found, compared=isinstance(match, Match))
    scales = (f"{key}{SCALE_ENDING}" for key, entry in held.items() if entry.dtype in FP8)
    unscaled = [key for key in scales if key not in held and key not in found.missing]
    return replace(found, missing=(*found.missing, *unscaled))


def _against_index(found: FileReport, held: Weights, path: Path, part: str) -> FileReport:
    """The report of a bundle's file with what the bundle's index says of it. Raises UnreadableFile."""
    try:
        index = parse_file(path)
    except BundleError as error:
        raise UnreadableFile(str(error)) from error
    number = {file.part: i for i, file in enumerate(index.files)}.get(part)
    if number is None:
        raise UnreadableFile(f"{path} knows no {part}{WEIGHTS_ENDING}; it belongs to another bundle")
    wanted = {record.name.removeprefix(f"{part}."): record for record in index.tensors if record.file == number}
    both = [(key, held[key], record) for key, record in wanted.items() if key in held]
    return replace(
        found,
        missing=tuple(key for key in wanted if key not in held),
        unexpected=tuple(key for key in held if key not in wanted),
        misshaped=tuple(
            f"{key} {_kind(entry.dtype, entry.shape)}, expected {_kind(record.dtype.torch, record.shape)}"
            for key, entry, record in both
            if (entry.dtype, entry.shape) != (record.dtype.torch, record.shape)
        ),
    )


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _check_count(files: list[Path]) -> None:
    """Shards without an index are all there."""
    if shard := SHARD.fullmatch(files[0].name):
        there = {int(found["place"]) for file in files if (found := SHARD.fullmatch(file.name))}
        absent = [str(place) for place in range(1, int(shard["count"]) + 1) if place not in there]
        if absent:
            what = f"of {int(shard['count'])} shards number {', '.join(absent)} is not there"
            raise UnreadableFile(f"{files[0].parent}: {what}; download it")


def describe(name: str, weights: Weights, match: Match | Adapters | None) -> FileReport:
    """The report of open weights that are like `match`."""
    what, part = "", ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    if isinstance(match, Match):
        part, also = match.published.name, ALSO.get(match.published.name)
        what = f"{part}, {match.published.part}" + (f" ({also})" if also else "")
        missing, unexpected, misshaped = match.missing, match.unexpected, match.misshaped
    elif isinstance(match, Adapters):
        fits = f"fits {', '.join(match.fits)}" if match.fits else "fits no transformer that is known"
        what = f"LoRA of {match.layers} layers, rank {match.rank}: {fits}"
    return FileReport(
        name,
        what,
        part,
        missing,
        unexpected,
        misshaped,
        bytes=sum(entry.nbytes for entry in weights.values()),
        tensors=len(weights),
        parameters=sum(entry.count for entry in weights.values()),
        dtypes=dict(Counter(entry.dtype for entry in weights.values())),
        shards=len(weights.files),
    )


def _systems(files: list[FileReport]) -> dict[str, tuple[str, ...]]:
    """System -> parts that were not found, for the systems whose own part was."""
    found = {file.part for file in files}
    return {
        system: tuple(part for part in parts if part not in found)
        for system, parts in SYSTEMS.items()
        if parts[0] in found
    }
