"""Opening media files with errors that a user understands."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from ..errors import InputError


@contextmanager
def open_media(path: Path, wanted: str) -> Iterator[InputContainer]:
    """An open container of the file; `wanted` ("sound", "video") is what messages call it. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a {wanted} file")
    if not path.exists():
        raise InputError(f"no such {wanted} file: {path}; check the path")
    if not os.access(path, os.R_OK):
        raise InputError(f"no permission to read {path}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is an empty file; give a {wanted} file")
    unreadable = InputError(f"{path} is no {wanted} file that can be read, or it is damaged or cut off")
    try:
        container = av.open(f"file:{path}", metadata_errors="ignore")
    except av.error.FFmpegError as error:
        raise unreadable from error
    with container:
        if not len(container.streams):
            raise unreadable
        yield container


def decode(container: InputContainer, stream: AudioStream | VideoStream) -> Iterator[Any]:
    """Every frame of one stream; damaged packets are left out, and unreadable data ends it like the end of the file."""
    packets = container.demux(stream)
    ended = False
    while not ended:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            packet = None
        ended = packet is None
        try:
            frames = stream.codec_context.decode(packet)
        except (av.error.InvalidDataError, av.error.EOFError):
            continue
        yield from frames
