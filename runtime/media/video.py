"""Video files -> frames and sound on one clock."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from ..errors import InputError
from .audio import read_audio
from .files import decode, open_media

MAX_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Clip:
    """A video in memory: frame i is shown at i / fps seconds, sample n is heard at n / audio_rate seconds."""

    frames: np.ndarray  # uint8 RGB [T, H, W, 3]
    fps: Fraction
    audio: np.ndarray | None  # float32 mono [n]; None without a sound track
    audio_rate: int


def read_video(path: str | os.PathLike[str], audio_rate: int = 16_000) -> Clip:
    """All frames, upright, and the sound at `audio_rate` Hz, padded or cut in front so that it starts with frame 0.

    `fps` is the average rate; frames come as they are stored. Raises InputError when the file is missing, cannot be
    decoded, holds no frames, or would fill more than MAX_BYTES.
    """
    path = Path(path)
    frames: list[np.ndarray] = []
    with open_media(path, "video") as container:
        stream = _video_stream(path, container)
        fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
        start = None
        for seconds, frame in _decode_frames(container, stream):
            start = seconds if start is None else start
            frames.append(frame)
            if len(frames) * frame.nbytes > MAX_BYTES:
                raise InputError(f"{path} fills more than {MAX_BYTES // 2**30} GiB when decoded; cut it into parts")
    if start is None:
        raise InputError(f"{path} holds no frames that can be decoded; export the video again")
    return Clip(np.stack(frames), fps, _sound_from(path, start, audio_rate), audio_rate)


def iter_frames(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The frames of `read_video`, uint8 RGB [H, W, 3], one at a time; same errors but for the size."""
    path = Path(path)
    count = 0
    with open_media(path, "video") as container:
        for _, frame in _decode_frames(container, _video_stream(path, container)):
            count += 1
            yield frame
    if count == 0:
        raise InputError(f"{path} holds no frames that can be decoded; export the video again")


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song
            return stream
    raise InputError(f"{path} holds no video; give a video file")


def _decode_frames(container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, np.ndarray]]:
    for frame in decode(container, stream):
        rgb = frame.to_ndarray(format="rgb24", src_colorspace=frame.colorspace, src_color_range=frame.color_range)
        yield frame.time or 0.0, np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))


def _sound_from(path: Path, start: float, rate: int) -> np.ndarray | None:
    """Sound float32 [n] from `start` seconds on the container's clock; silence where it begins later."""
    with open_media(path, "video") as container:
        first = next(decode(container, container.streams.audio[0]), None) if container.streams.audio else None
    if first is None:
        return None
    samples = read_audio(path, rate)
    late = round(((first.time or 0.0) - start) * rate)
    return np.concatenate([np.zeros(late, np.float32), samples]) if late > 0 else samples[-late:]
