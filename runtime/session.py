"""A running video: sound goes in piece by piece, frames come out as soon as a block of them can be made."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .inputs import as_samples
from .placement.base import Engine
from .systems.audio_features import AudioFeatures
from .systems.liveavatar import BlockStream, frames_to_bytes
from .systems.liveavatar_mode import AUDIO_RATE, GenerationMode


@dataclass(frozen=True)
class SessionStats:
    """Numbers of a session so far; the times count work, not waiting for sound.

    `opening`: seconds of the opening: picture, prompt and condition, and compiling where that was due;
    `time_to_first_frame`: from the start of the opening to the first frame, None before it; `fps`: frames made per
    second of work after the opening; `audio_seconds`: sound fed.
    """

    opening: float
    time_to_first_frame: float | None
    fps: float
    frames: int
    audio_seconds: float


class Session:
    """One endless video, opened by `Avatar.stream`. Its memory does not grow, however long it runs.

    Frame i belongs to the sound at i / `fps` seconds. The frames do not depend on how the sound is cut into pieces.
    `size` is (height, width) in pixels. As a context manager it closes itself. `open_features` gives what hears the
    sound, `open_engine` what it runs on (the prompt is read there), `open_blocks` starts the video on it.
    """

    def __init__(
        self,
        open_features: Callable[[], AudioFeatures],
        open_engine: Callable[[], Engine],
        open_blocks: Callable[[Engine], BlockStream],
        mode: GenerationMode,
        size: tuple[int, int],
    ):
        started = time.perf_counter()
        self.mode = mode
        self.size = size
        self._samples = 0
        self._frames = 0
        self._finished = False
        self._first_frame: float | None = None
        with torch.inference_mode():
            self._features = open_features()
            self._engine: Engine | None = open_engine()
            try:
                with self._engine.turn:
                    self._blocks: BlockStream | None = open_blocks(self._engine)
                # features [K, C, n] of frames that do not fill a block yet
                self._pending = self._features.push(torch.zeros(mode.lead_frames * mode.samples_per_frame))
            except BaseException:
                self._engine.release()
                raise
        self._opening = time.perf_counter() - started
        self._working = 0.0

    @property
    def fps(self) -> int:
        return self.mode.fps

    @property
    def stats(self) -> SessionStats:
        rate = self._frames / self._working if self._working else 0.0
        return SessionStats(self._opening, self._first_frame, rate, self._frames, self._samples / AUDIO_RATE)

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """Mono sound, float32 [n] at 16 kHz (any n) -> the new frames, uint8 RGB [T, H, W, 3], T may be 0.

        With placement "batched" a block's frames come when `steps - 1` later blocks have been heard.

        Errors: InputError for another shape or type, for NaN or infinite samples, and after `finish` or `close`.
        """
        self._check_open()
        samples = as_samples(samples)
        self._samples += len(samples)
        heard = torch.from_numpy(np.require(samples, requirements=["C", "W"]))  # PyTorch warns if not writable
        # block by block: each copies what is left, and features of minutes of sound would take gigabytes
        pieces = heard.split(self.mode.block_frames * self.mode.samples_per_frame)
        made = [self._run(self._features.push, piece) for piece in pieces]
        frames = [some for some in made if len(some)] or made[:1]
        return frames[0] if len(frames) == 1 else np.concatenate(frames)

    def finish(self) -> np.ndarray:
        """The remaining frames, as if silence followed: ceil(seconds * fps) in all. Takes no more sound afterwards."""
        self._check_open()
        self._finished = True
        mode, total = self.mode, self.mode.frames_for(self._samples)
        wanted = mode.blocks_for(total) * mode.block_frames - mode.lead_frames
        silence = torch.zeros(max(wanted * mode.samples_per_frame - self._samples, 0))
        made = self._frames
        last = [
            self._run(self._features.push, silence),
            self._run(lambda _: self._features.finish(), silence),
            self._drain(),
        ]
        self._frames = min(self._frames, total)
        return np.concatenate(last)[: total - made]

    def close(self) -> None:
        """Free the session's memory, or keep what was compiled for the next one; what `finish` would give is lost.

        Any thread may close. In placement "captured" or "batched" that waits for the block that is being made; a `feed`
        or `finish` of another thread that has more to make raises InputError.
        """
        self._finished = True
        engine = self._engine
        if engine is None:
            return
        with engine.turn:  # a block of this session may be running on it
            if self._engine is None:  # closed by another thread
                return
            self._engine = self._blocks = None
            engine.release()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._finished:
            raise _ended()

    @torch.inference_mode()
    def _run(self, extract: Callable[[Tensor], Tensor], samples: Tensor) -> np.ndarray:
        """Features of `samples` -> frames of the blocks that are finished now."""
        started = time.perf_counter()
        self._pending = torch.cat((self._pending, extract(samples)), -1)
        frames, step = [np.empty((0, *self.size, 3), np.uint8)], self.mode.block_frames
        while self._pending.shape[-1] >= step:
            features = self._pending[None, ..., :step]
            frames.append(self._show(features, started))
            self._pending = self._pending[..., step:].clone()
        self._working += time.perf_counter() - started
        return frames[1] if len(frames) == 2 else np.concatenate(frames)

    @torch.inference_mode()
    def _drain(self) -> np.ndarray:
        """Frames of the blocks that are still on their way."""
        started = time.perf_counter()
        frames = self._show(None, started)
        self._working += time.perf_counter() - started
        return frames

    def _show(self, features: Tensor | None, started: float) -> np.ndarray:
        """Frames that the next block's features bring, None: of the blocks still on their way, on the host; the work
        that they are part of began at `started`."""
        engine = self._engine
        if engine is None:
            raise _ended()
        with engine.turn:
            blocks = self._blocks
            if blocks is None:  # closed while this thread waited: the engine may be another session's by now
                raise _ended()
            made = blocks.finish() if features is None else blocks.next(features)
            frames = frames_to_bytes(made[1]).cpu().numpy()
        self._frames += len(frames)
        if self._first_frame is None and self._frames:
            self._first_frame = self._opening + self._working + time.perf_counter() - started
        return frames


def _ended() -> InputError:
    return InputError("this session has ended; open a new one with Avatar.stream()")
