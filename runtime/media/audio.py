"""Sound of any file -> float32 mono at one rate."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer

from ..errors import InputError
from .files import decode, open_media

MAX_SECONDS = 4 * 3600
SILENCE_DBFS = -60.0
TOLERANCE_SECONDS = 0.5  # a file that ends this much before its own header says is cut off
PADDING_SECONDS = 0.2  # more than any encoder adds to fill its last frame
EXACT_FORMATS = {"wav", "flac", "aiff", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}  # their headers state the length


def read_audio(path: str | os.PathLike[str], rate: int = 16_000) -> np.ndarray:
    """The first sound track as float32 mono [n] at `rate` Hz; sample 0 is the first sound of the track.

    Any container and codec that FFmpeg decodes (wav, mp3, m4a, flac, ogg, a video, ...), any rate, channels and
    sample format. Stereo is averaged; more channels are mixed to stereo first. Encoder delay is removed where the
    file records it. Nothing is clipped. Raises InputError when the file is missing, holds no sound or none at all,
    is cut off, holds numbers that are not finite, or is longer than MAX_SECONDS.
    """
    return np.concatenate(list(iter_audio(path, rate)))


def iter_audio(path: str | os.PathLike[str], rate: int = 16_000) -> Iterator[np.ndarray]:
    """`read_audio` piece by piece, in constant memory; same samples, same errors (raised while iterating)."""
    path = Path(path)
    count = 0
    with open_media(path, "sound") as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            raise InputError(f"{path} has no sound; give a recording, or a video with a sound track")
        stated = _stated_seconds(path, container, stream)
        pieces = _resampled(container, stream, rate)
        if stated is not None:
            pieces = _without_padding(pieces, round(stated * rate), round(PADDING_SECONDS * rate))
        for samples in pieces:
            if not np.isfinite(samples).all():
                raise InputError(f"{path} holds samples that are not finite numbers; export the sound again")
            count += len(samples)
            if count > MAX_SECONDS * rate:
                raise InputError(f"{path} is longer than {MAX_SECONDS // 3600} hours; cut it into parts")
            yield samples
    if count == 0:
        raise InputError(f"{path} has a sound track with nothing in it; give a recording that plays")
    if stated is not None and count / rate < stated - TOLERANCE_SECONDS:
        told = f"says that it lasts {stated:.1f} s but ends after {count / rate:.1f} s"
        raise InputError(f"{path} is cut off: it {told}; copy or export it again")


def peak_dbfs(samples: np.ndarray) -> float:
    """Loudest sample in dB relative to full scale; -inf for digital silence."""
    peak = float(np.abs(samples).max(initial=0.0))
    return 20 * math.log10(peak) if peak > 0 else -math.inf


def is_silent(samples: np.ndarray) -> bool:
    """True when no sample reaches SILENCE_DBFS."""
    return peak_dbfs(samples) < SILENCE_DBFS


def _resampled(container: InputContainer, stream: AudioStream, rate: int) -> Iterator[np.ndarray]:
    """Samples float32 mono [n] of every decoded piece; a format that changes midway starts a new resampler."""
    resampler: av.AudioResampler | None = None
    setup: tuple[str, str, int] | None = None
    for frame in decode(container, stream):
        if setup != (found := (frame.format.name, frame.layout.name, frame.sample_rate)):
            if resampler is not None:
                yield from map(_mono, resampler.resample(None))
            resampler, setup = av.AudioResampler("flt", _mixed_layout(frame), rate), found
        assert resampler is not None
        yield from map(_mono, resampler.resample(frame))
    if resampler is not None:
        yield from map(_mono, resampler.resample(None))


def _without_padding(pieces: Iterator[np.ndarray], end: int, most: int) -> Iterator[np.ndarray]:
    """Leave out what an encoder appended after sample `end`; more than `most` is no padding and is kept."""
    count = 0
    held: list[np.ndarray] = []
    for piece in pieces:
        count += len(piece)
        held.append(piece)
        if not end < count <= end + most:
            yield from held
            held.clear()
    if held:
        tail = np.concatenate(held)
        yield tail[: len(tail) - (count - end)]


def _mono(frame: av.AudioFrame) -> np.ndarray:
    packed = frame.to_ndarray()  # [1, n * channels]: PyAV crashes on planes of more than 7 channels
    return packed.reshape(-1, frame.layout.nb_channels).mean(axis=1, dtype=np.float32)


def _mixed_layout(frame: av.AudioFrame) -> str:
    """Surround goes through FFmpeg's stereo mix, which knows where speech is; the mean serves all others."""
    named = "channels" not in frame.layout.name
    return "stereo" if named and frame.layout.nb_channels > 2 else frame.layout.name


def _stated_seconds(path: Path, container: InputContainer, stream: AudioStream) -> float | None:
    """Length that the file's header states, or None where there is none or it is a guess."""
    name = container.format.name
    if name == "wav" and (stated := _wav_seconds(path, stream)) is not None:
        return stated
    if name not in EXACT_FORMATS and not (name == "mp3" and stream.start_time is not None):  # mp3 with a length tag
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else None


def _wav_seconds(path: Path, stream: AudioStream) -> float | None:
    """Length by the size in the `data` chunk: FFmpeg's own figure shrinks with a file that was cut off."""
    bits_per_second = stream.codec_context.bit_rate if stream.codec_context.name.startswith("pcm_") else 0
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or not bits_per_second:
            return None
        file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                unknown = size == 0 or size >= 0xFFFF_FF00  # written to a pipe
                return None if unknown else size * 8 / bits_per_second
            file.seek(size + size % 2, os.SEEK_CUR)
    return None
