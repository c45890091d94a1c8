"""Is a bundle what it says it is: hashes, checksums, the index against the weight files, finite values, noise."""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .format import BundleError, FileRecord, TensorRecord
from .layout import PAD
from .read import Bundle, map_file, view
from .write import file_sha256

LEAST_SQNR = 20.0  # dB; e4m3 with a scale a channel gives about 31 on weights that are normally distributed
NUMBERS_AT_ONCE = 1 << 24
SMALLEST_E4M3 = 2.0**-9  # below the normal numbers its values are as far apart
# Relative L2, of what another device computed once more; in half precision through all layers of a text encoder.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
ONE_ROW = 2.0  # times as much may be the error of a single row


@dataclass
class Verification:
    """What was found: `problems` in words, and what was compared with the source.

    `equal`: parts whose tensors were compared with the source's bit by bit, but for those in `sqnr`, which says in dB
    how far each quantised one is from it; `recomputed`: parts that the source computes, and the largest relative L2
    error of their tensors; `uncompared`: parts of which the source has nothing. All empty without a source.
    """

    tensors: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list)
    sqnr: dict[str, float] = field(default_factory=dict)
    equal: list[str] = field(default_factory=list)
    recomputed: dict[str, float] = field(default_factory=dict)
    uncompared: list[str] = field(default_factory=list)

    def need(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


Parts = Mapping[str, Mapping[str, Tensor]]


def verify(bundle: Bundle, source: Parts | None = None, recomputed: Parts | None = None) -> Verification:
    """Read every byte of a bundle and check it; `source`: part -> key -> tensor that parts should have been made of.

    A tensor of the source's dtype must be equal to it, a quantised one reach LEAST_SQNR, as a whole and in every row.
    `recomputed`: likewise for parts that hold results and no weights; sums in another order may differ by
    LARGEST_ERROR, a single row by ONE_ROW times that, and other dtypes not at all.
    """
    found = Verification()
    _check_hashes(bundle, found)
    for part in sorted({*(source or ()), *(recomputed or ())} - {file.part for file in bundle.index.files}):
        found.problems.append(f"the bundle lacks the part {part}, which its source has")
    for file in bundle.index.files:
        records = bundle.records(file.part)
        found.tensors += len(records)
        found.size += file.size
        try:
            data = map_file(bundle.folder, file)
            _check_header(bundle.folder / file.name, file, records, found)
        except BundleError as error:
            found.problems.append(str(error))
            continue
        _check_bytes(file, records, data, found)
        tensors = {key: view(data, record) for key, record in records.items()}
        scales = {key: bundle.index.tensors[r.scale].name for key, r in records.items() if r.scale is not None}
        for key, tensor in tensors.items():
            _check_values(f"{file.part}.{key}", tensor, found)
        used = {name.removeprefix(f"{file.part}.") for name in scales.values()}
        for key in used & tensors.keys():
            found.need(bool((tensors[key] > 0).all()), f"{file.part}.{key} has scales that are not positive")
        if source is not None and file.part in source:
            found.equal.append(file.part)
            _compare(file.part, tensors, scales, used, source[file.part], found)
        elif recomputed is not None and file.part in recomputed:
            found.recomputed[file.part] = _compare_results(file.part, tensors, recomputed[file.part], found)
        elif source is not None or recomputed is not None:
            found.uncompared.append(file.part)
    return found


def _check_hashes(bundle: Bundle, found: Verification) -> None:
    """Sizes and SHA-256 of the manifest, in parallel."""
    listed = bundle.manifest.get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        found.problems.append("the manifest lists no files")
        return
    for file in bundle.index.files:
        found.need(file.name in listed, f"the manifest does not list {file.name}")
    with ThreadPoolExecutor(4) as pool:
        found.problems += filter(None, pool.map(lambda item: _check_hash(bundle.folder, *item), listed.items()))


def _check_hash(folder: Path, name: str, entry: Mapping[str, Any]) -> str:
    """What is wrong with a file that the manifest lists, or nothing."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return f"the manifest lists {name!r}, outside of the bundle"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("size"):
            return f"{name} has {path.stat().st_size} bytes, the manifest says {entry.get('size')}"
        same = file_sha256(path) == entry.get("sha256")
        return "" if same else f"{name} has another SHA-256 than the manifest says"
    except (OSError, ValueError) as error:  # a name that no file can have, or a disk that fails
        return f"the manifest lists {name!r}, which cannot be read ({error})"


def _check_header(path: Path, file: FileRecord, records: Mapping[str, TensorRecord], found: Verification) -> None:
    """The library opens the file, and its header says what the index says."""
    try:
        with safe_open(path, "pt") as opened:
            keys = [key for key in opened.keys() if not key.startswith(PAD)]  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        found.problems.append(f"{file.name} is no safetensors file ({error})")
        return
    found.need(sorted(keys) == sorted(records), f"{file.name} and the index list other tensors")
    with open(path, "rb") as raw:
        header = json.loads(raw.read(file.data_offset)[8:])
    for key in keys:
        if key in records:
            record, said = records[key], header[key]
            here = [record.offset - file.data_offset, record.end - file.data_offset]
            same = (said["dtype"], said["shape"], said["data_offsets"]) == (record.dtype.name, [*record.shape], here)
            found.need(same, f"{file.name}: the header and the index differ in {key}")


def _check_bytes(file: FileRecord, records: Mapping[str, TensorRecord], data: Tensor, found: Verification) -> None:
    """CRC-32 of the header and of each tensor; what lies between them is zero."""
    raw = data.numpy().data
    found.need(zlib.crc32(raw[: file.data_offset]) == file.checksum, f"{file.name}: its header was damaged")
    end = file.data_offset
    for key, record in records.items():
        found.need(not any(raw[end : record.offset]), f"{file.name}: bytes before {key} are not zero")
        found.need(zlib.crc32(raw[record.offset : record.end]) == record.checksum, f"{file.part}.{key} was damaged")
        end = record.end
    found.need(end == file.size, f"{file.name}: bytes behind the last tensor")


def _pieces(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first axis with a bounded number of values."""
    step = max(1, NUMBERS_AT_ONCE // max(1, math.prod(tensor.shape[1:])))
    return (slice(start, start + step) for start in range(0, tensor.shape[0], step))


def _check_values(name: str, tensor: Tensor, found: Verification) -> None:
    if tensor.is_floating_point():
        rows = tensor if tensor.ndim else tensor[None]
        finite = all(bool(torch.isfinite(rows[piece].float()).all()) for piece in _pieces(rows))
        found.need(finite, f"{name} holds NaN or infinite values")


def _compare(
    part: str,
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, str],
    used: set[str],
    source: Mapping[str, Tensor],
    found: Verification,
) -> None:
    """The tensors of a part with those that it was made of."""
    for key, ours, theirs in _pairs(part, {key: tensors[key] for key in tensors if key not in used}, source, found):
        if key in scales:
            scale = tensors[scales[key].removeprefix(f"{part}.")]
            signal, noise = _row_powers(ours, scale, theirs)
            whole = _decibels(float(signal.sum()), float(noise.sum()))
            found.sqnr[f"{part}.{key}"] = whole
            told = f"dB from the source, below {LEAST_SQNR:g}"
            if whole < LEAST_SQNR:
                found.problems.append(f"{part}.{key} is {whole:.1f} {told}")
            elif (row := _noisy_row(signal, noise, scale, ours.numel())) is not None:
                found.problems.append(
                    f"{part}.{key}: row {row} is {_decibels(float(signal[row]), float(noise[row])):.1f} {told}"
                )
        else:
            found.need(_same_bits(ours, theirs), f"{part}.{key} is not the source's")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtypes and bytes, of tensors of one shape: other than for `torch.equal`, -0.0 is not 0.0."""
    return a.dtype == b.dtype and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _noisy_row(signal: Tensor, noise: Tensor, scale: Tensor, count: int) -> int | None:
    """The row furthest from the source of those that are further than LEAST_SQNR; powers [N] of a weight of `count`
    values. What e4m3 rounds to its smallest numbers is allowed: with one scale for all, a row may be that small."""
    smallest = count / max(1, len(signal)) * (scale.double().reshape(-1) * SMALLEST_E4M3 / 2).square()
    excess = noise / (signal * 10 ** (-LEAST_SQNR / 10) + smallest)
    return int(excess.argmax()) if len(excess) and not bool((excess <= 1).all()) else None


def _pairs(
    part: str, tensors: Mapping[str, Tensor], source: Mapping[str, Tensor], found: Verification
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, ours, the source's) where both have the key and one shape; what differs is a problem."""
    if differing := sorted(tensors.keys() ^ source.keys()):
        found.problems.append(f"{part}: the source and the bundle have other tensors ({', '.join(differing[:6])})")
    for key in [key for key in tensors if key in source]:
        ours, theirs = tensors[key], source[key].cpu()
        if ours.shape == theirs.shape:
            yield key, ours, theirs
        else:
            found.problems.append(f"{part}.{key} has shape {list(ours.shape)}, the source {list(theirs.shape)}")


def _compare_results(
    part: str, tensors: Mapping[str, Tensor], source: Mapping[str, Tensor], found: Verification
) -> float:
    """The largest relative L2 error of the tensors of a part against those that the source computes here."""
    errors = [0.0]
    for key, ours, theirs in _pairs(part, tensors, source, found):
        if ours.dtype != theirs.dtype:
            found.problems.append(f"{part}.{key} has dtype {ours.dtype}, the source {theirs.dtype}")
            continue
        if ours.dtype not in LARGEST_ERROR:
            found.need(_same_bits(ours, theirs), f"{part}.{key} is not what the source gives")
            continue
        error, limit = float(_relative(ours.reshape(1, -1), theirs.reshape(1, -1))), LARGEST_ERROR[ours.dtype]
        told = "from what the source gives (limit"
        if not error <= limit:  # nor NaN
            found.problems.append(f"{part}.{key} differs by {error:.1e} {told} {limit:.0e})")
        elif ours.ndim > 1 and ours.numel():
            rows = _relative(ours.flatten(0, -2), theirs.flatten(0, -2))
            row, limit = int(rows.argmax()), ONE_ROW * limit
            found.need(
                float(rows[row]) <= limit, f"{part}.{key}: row {row} differs by {rows[row]:.1e} {told} {limit:.0e})"
            )
        errors.append(error)
    return max(errors)


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """Relative L2 error of each row: [N, K], [N, K] -> float64 [N]."""
    return (ours.double() - theirs.double()).norm(dim=1) / theirs.double().norm(dim=1).clamp(min=1e-30)


def sqnr(quantised: Tensor, scale: Tensor, original: Tensor) -> float:
    """Signal to quantisation noise in dB of a weight [N, ...] with scales [1] or [N, 1]; infinite when it is exact."""
    signal, noise = _row_powers(quantised, scale, original)
    return _decibels(float(signal.sum()), float(noise.sum()))


def _row_powers(quantised: Tensor, scale: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of each row, float64 [N]: of a weight, and of what its quantisation added."""
    signal, noise = torch.zeros(2, original.shape[0], dtype=torch.float64)
    for piece in _pieces(original):
        factor = scale if scale.numel() == 1 else scale[piece].reshape(-1, *(1,) * (original.ndim - 1))
        wide = original[piece].float()
        signal[piece] = wide.double().square().unsqueeze(-1).flatten(1).sum(1)
        noise[piece] = (quantised[piece].float() * factor - wide).double().square().unsqueeze(-1).flatten(1).sum(1)
    return signal, noise


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
