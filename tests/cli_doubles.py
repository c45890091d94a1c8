"""The program run in this process, and an avatar that makes frames without a model. Needs no PyAV."""

from dataclasses import dataclass

import numpy as np
import pytest
from kinora.runtime.cli import main

RATE, FPS, BLOCK = 16_000, 25, 12


@dataclass
class Stats:
    """What the summary line reads."""

    time_to_first_frame: float | None = 0.5
    fps: float = 40.0


class FakeSession:
    """Frames in blocks of 12 whose brightness follows the sound; stops as if Ctrl-C came after `stop_at` frames."""

    size, fps = (96, 128), FPS

    def __init__(self, stop_at: int | None = None, error: Exception | None = None) -> None:
        self.stats = Stats()
        self.sound = np.zeros(0, np.float32)
        self.made, self.stop_at, self.error, self.closed = 0, stop_at, error, False

    def feed(self, samples: np.ndarray) -> np.ndarray:
        assert samples.dtype == np.float32 and len(samples) <= RATE
        self.sound = np.concatenate([self.sound, samples])
        return self._frames(len(self.sound) * FPS // RATE // BLOCK * BLOCK)

    def finish(self) -> np.ndarray:
        return self._frames(-(-len(self.sound) * FPS // RATE))

    def __enter__(self) -> "FakeSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def _frames(self, total: int) -> np.ndarray:
        if self.stop_at is not None and self.made >= self.stop_at:
            raise self.error or KeyboardInterrupt
        per_frame = RATE // FPS
        levels = [np.abs(self.sound[i * per_frame : (i + 1) * per_frame]).max() for i in range(self.made, total)]
        self.made = total
        frames = [np.full((*self.size, 3), 30 + 200 * (level > 0.3), np.uint8) for level in levels]
        return np.stack(frames) if frames else np.empty((0, *self.size, 3), np.uint8)


class FakeAvatar:
    """Remembers how it was asked; `session` is what it opens."""

    def __init__(self, session: FakeSession) -> None:
        self.session, self.asked = session, {}

    def stream(self, image: np.ndarray, **asked: object) -> FakeSession:
        self.asked = {"image": image, **asked}
        return self.session


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    """(exit code, standard output, lines on standard error)."""
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()
