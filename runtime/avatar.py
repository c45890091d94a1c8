"""The thing that people hold: a loaded model that turns pictures and voices into talking videos."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import numpy as np

from .errors import InputError
from .inputs import AudioInput, ImageInput, as_picture, as_seed, as_sound
from .placement.base import Engine, Placement
from .placement.engines import SinglePlacement
from .preprocess import image_pixels, select_size
from .session import Session
from .systems.audio_features import AudioFeatures
from .systems.liveavatar import BlockStream, LiveAvatarSystem
from .systems.liveavatar_draws import SeededDraws
from .systems.liveavatar_mode import AUDIO_RATE, GenerationMode

FILE_SOUND_RATE = 48_000  # samples per second of the sound of a file in the video
SMALLEST, LARGEST = 64, 2048  # pixels a side
PORTRAIT = (704, 384)  # (height, width) that is warmed up where the model has no size: a 9:16 picture's
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Video:
    """Frames uint8 RGB [T, H, W, 3] at `fps`, and mono float32 sound at `audio_rate`; both start at time 0."""

    frames: np.ndarray
    fps: int
    audio: np.ndarray
    audio_rate: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an MP4 (H.264, AAC). Errors: InputError for another ending, OutputError when it cannot be written."""
        from .media.writer import VideoWriter  # PyAV is needed for files only

        height, width = self.frames.shape[1:3]
        with VideoWriter(path, width, height, self.fps, self.audio_rate) as writer:
            for start in range(0, len(self.frames), self.fps):  # second by second, so that the streams interleave
                writer.write_frames(self.frames[start : start + self.fps])
                second = start // self.fps
                writer.write_audio(self.audio[second * self.audio_rate : (second + 1) * self.audio_rate])


class Avatar:
    """A loaded model; make one with `load`. Several sessions may run side by side, each holds its own state."""

    def __init__(self, name: str, system: LiveAvatarSystem, placement: Placement | None = None):
        """`placement`: where sessions run; None for plain steps on the device of the models."""
        self.name = name
        self.system = system
        self.placement: Placement = placement or SinglePlacement(system)

    @property
    def mode(self) -> GenerationMode:
        """How it generates; `configured` changes it."""
        return self.system.mode

    @property
    def fps(self) -> int:
        return self.mode.fps

    @property
    def size(self) -> int | None:
        """Shorter side in pixels of the videos that the model was trained for, None when they follow the picture."""
        return None if self.system.size is None else min(self.system.size)

    def configured(self, **changes: Any) -> "Avatar":
        """The same model in another `GenerationMode`: `configured(cache_latents=6)`, `configured(aligned=False)`, ...

        Errors: InputError for an unknown option or a value that does not fit.
        """
        unknown = changes.keys() - GenerationMode.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(GenerationMode.__dataclass_fields__)
            raise InputError(f"a mode has no option {', '.join(sorted(unknown))}; it has {known}")
        mode, fixed = replace(self.mode, **changes), self.mode.block_latents
        if mode.block_latents != fixed:
            raise InputError(
                f"block_latents is {mode.block_latents}; {self.name} makes blocks of {fixed} latent frames"
            )
        return Avatar(self.name, replace(self.system, mode=mode), self.placement)

    def video_size(self, picture: np.ndarray, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) of the video of a picture [H, W, 3]: `size`, the model's own, or near the picture's shape."""
        if size is None:
            return self.system.size or select_size(picture.shape[0], picture.shape[1], self.system.max_area)
        return self._fitting(size)

    def stream(
        self,
        image: ImageInput,
        *,
        prompt: str = "",
        seed: int = 0,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Session:
        """Open an endless video of the person in `image` (a path, a PIL image or uint8 RGB [H, W, 3]).

        `seed`: same seed, same frames; `steps`: denoising steps, None for the mode's; `size`: (height, width) in
        pixels, None to choose. The picture is scaled and cropped at the centre to that size. In placement "captured"
        or "batched" the first session of a size and number of steps compiles (half a minute at 14B) unless `warm_up`
        did; close sessions, so that the next one finds it.
        Errors: InputError for a picture, seed, number of steps or size that cannot be used.
        """
        seed = as_seed(seed)
        mode = self.mode if steps is None else replace(self.mode, steps=steps)
        picture = as_picture(image)
        height, width = self.video_size(picture, size)

        factor = self.system.vae.config.spatial_factor
        grid = height // factor, width // factor

        def open_features() -> AudioFeatures:
            return self.placement.audio_features(mode)

        def open_engine() -> Engine:
            return self.placement.open(self.system.encode_prompt(prompt), mode, grid)

        def open_blocks(engine: Engine) -> BlockStream:
            dit = self.system.dit
            pixels = image_pixels(picture, height, width).to(dit.device)
            draws = SeededDraws(seed, mode, dit.dtype, dit.device)
            return BlockStream(engine.vae, mode, pixels, lambda _: engine.denoiser, draws)

        return Session(open_features, open_engine, open_blocks, mode, (height, width))

    def warm_up(self, size: tuple[int, int] | None = None, *, steps: int | None = None, sessions: int = 1) -> float:
        """Do now what the first sessions would: compile, record and tune everything for `size` (height, width), None
        for the model's own, and `steps`. Returns the seconds that it took.

        That many `sessions` of this size can then be open at once without another compilation; their memory stays
        taken. Opening or warming up another size makes room by dropping ones that wait, so warm up one size only. With
        placement "single" there is nothing to compile, and only kernels and libraries are loaded.
        Errors: InputError as `stream`, and for a number of sessions below 1.
        """
        if sessions < 1:
            raise InputError(f"{sessions} sessions cannot be made ready; pass 1 or more")
        started = time.perf_counter()
        height, width = self._fitting(size or self.system.size or PORTRAIT)
        self.placement.keep(sessions)
        grey = np.full((height, width, 3), 128, np.uint8)
        with ExitStack() as opened:
            streams = [
                opened.enter_context(self.stream(grey, size=(height, width), steps=steps)) for _ in range(sessions)
            ]
            streams[0].feed(np.zeros(1, np.float32))
            streams[0].finish()
        return time.perf_counter() - started

    def generate(
        self,
        image: ImageInput,
        audio: AudioInput,
        *,
        prompt: str = "",
        seed: int = 0,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Video:
        """A whole video: the frames of `stream` fed with all of `audio` (a path, or float32 [n] mono at 16 kHz).

        It has ceil(seconds * fps) frames. `on_progress(frames done, frames in all)` is called after every block.
        Errors: as `stream`, and InputError for a sound that cannot be read or used.
        """
        samples, heard, rate = as_sound(audio, AUDIO_RATE, FILE_SOUND_RATE)
        with self.stream(image, prompt=prompt, seed=seed, steps=steps, size=size) as session:
            mode = session.mode
            total, done = mode.frames_for(len(samples)), 0
            frames = np.empty((total, *session.size, 3), np.uint8)
            piece = mode.block_frames * mode.samples_per_frame
            for start in range(0, len(samples) + piece, piece):
                last = start >= len(samples)
                new = session.finish() if last else session.feed(samples[start : start + piece])
                frames[done : done + len(new)] = new
                done += len(new)
                if on_progress and len(new):
                    on_progress(done, total)
        return Video(frames, mode.fps, heard, rate)

    def _fitting(self, size: tuple[int, int]) -> tuple[int, int]:
        """`size` in plain numbers; InputError when no video can have it."""
        step = 2 * self.system.vae.config.spatial_factor
        try:
            height, width = map(index, size)
            fits = all(side % step == 0 and SMALLEST <= side <= LARGEST for side in (height, width))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            told = " x ".join(map(str, size)) if isinstance(size, tuple) else repr(size)
            raise InputError(
                f"a video cannot be {told} pixels (height x width); both sides must be multiples of {step} from "
                f"{SMALLEST} to {LARGEST}"
            )
        return height, width
