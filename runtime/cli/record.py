"""Feeding a session with a voice and writing the video while it is made, for `kinora generate`."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np

from ..media.audio import iter_audio
from ..media.writer import VideoWriter
from .progress import FrameProgress

if TYPE_CHECKING:
    from ..session import Session

MODEL_RATE = 16_000  # samples per second that a session is fed with
HEARD_RATE = 48_000  # samples per second of the sound in the video
PIECE_SECONDS = 0.2  # how much sound is fed at once; frames come in the model's own blocks


def record(
    session: "Session", samples: np.ndarray, audio: Path, output: Path, progress: FrameProgress
) -> tuple[bool, str]:
    """Feed all samples and write what comes; (stopped by Ctrl-C, what was written)."""
    height, width = session.size
    fps, stopped = session.fps, False
    with ctrl_c_asks() as asked, VideoWriter(output, width, height, fps, HEARD_RATE, fragmented=True) as writer:
        sound = SoundTrack(audio)
        progress.start(math.ceil(len(samples) * fps / MODEL_RATE))
        try:
            for frames in _blocks(session, samples, asked):
                writer.write_frames(frames)
                writer.write_audio(sound.until(writer.frames_written / fps))
                progress.advance(writer.frames_written, session.stats.fps)
        except KeyboardInterrupt:
            stopped = True
    stopped = stopped or asked()
    if not writer.frames_written:
        return stopped, "nothing was written"
    stats, count = session.stats, writer.frames_written
    speed = f"{stats.fps:.1f} frames/s, first frame after {stats.time_to_first_frame or 0:.2f} s"
    return stopped, f"wrote {output}: {count} frames, {count / fps:.2f} s, {width}x{height} at {fps} fps ({speed})"


@contextmanager
def ctrl_c_asks() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the yielded function true; the second raises KeyboardInterrupt.

    An exception between any two instructions would leave a frame half written. Where something else handles Ctrl-C,
    or it is ignored (jobs in the background), that stays.
    """
    asked, before = False, signal.getsignal(signal.SIGINT)

    def note(number: int, place: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, place)
        asked = True

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _blocks(session: "Session", samples: np.ndarray, asked: Callable[[], bool]) -> Iterator[np.ndarray]:
    """Frames uint8 [T, H, W, 3] as the session makes them, T > 0, until the end or until it is asked to stop."""
    piece = round(PIECE_SECONDS * MODEL_RATE)
    for start in range(0, len(samples), piece):
        if asked():
            return
        frames = session.feed(samples[start : start + piece])
        if len(frames):
            yield frames
    if asked():
        return
    frames = session.finish()
    if len(frames):
        yield frames


class SoundTrack:
    """The sound of a file at HEARD_RATE, read as far as it is needed, so that memory stays flat."""

    def __init__(self, path: Path) -> None:
        self._pieces = iter_audio(path, HEARD_RATE)
        self._ready = np.zeros(0, np.float32)
        self._taken = 0

    def until(self, seconds: float) -> np.ndarray:
        """The samples, float32 [n], from where the last call ended to `seconds`; fewer where the sound ends."""
        count = max(round(seconds * HEARD_RATE) - self._taken, 0)
        while len(self._ready) < count and (piece := next(self._pieces, None)) is not None:
            self._ready = np.concatenate([self._ready, piece])
        samples, self._ready = self._ready[:count], self._ready[count:]
        self._taken += len(samples)
        return samples
