"""`kinora generate`: a picture and a voice -> a talking video, written while it is made."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ..errors import InputError
from ..media.audio import SILENCE_DBFS, is_silent, iter_audio, read_audio
from ..media.images import read_image
from ..media.writer import VideoWriter, check_output
from .options import Debug, Overwrite, check_overwrite, parse_size
from .progress import FrameProgress

if TYPE_CHECKING:
    from ..session import Session

MODEL_RATE = 16_000  # samples per second that a session is fed with
HEARD_RATE = 48_000  # samples per second of the sound in the video
PIECE_SECONDS = 0.2  # how much sound is fed at once; frames come in the model's own blocks
STOPPED = 130  # exit code after Ctrl-C


def generate(
    image: Annotated[Path, typer.Option("--image", "-i", help="The person: a picture (jpg, png, webp, ...).")],
    audio: Annotated[Path, typer.Option("--audio", "-a", help="The voice: any sound file, or a video with sound.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The video to write; ends with .mp4.")],
    model: Annotated[
        str,
        typer.Option(help="[bold]tiny[/] (embedded), [bold]liveavatar-14b[/], or a folder: trained, or a bundle."),
    ] = "tiny",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the published files; for models that are not embedded.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the scene shows; tiny takes no words.")] = "",
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the video, or one number for a square.")] = "",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default what the model was made for.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    placement: Annotated[str, typer.Option(help="How the model is spread over devices: auto, single.")] = "auto",
    allow_silence: Annotated[bool, typer.Option("--allow-silence", help="Go on when the sound is silent.")] = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Make a talking video of one picture and one voice.

    [bold]tiny[/] is embedded: it needs no download and runs on any laptop, and it animates pictures in the drawn
    style of [bold]kinora face[/] (and of examples/faces). For photographs, use a published model:
    [bold]liveavatar-14b[/] with the folder of its files.

    [bold]Examples[/]

    kinora face --seed 7 -o face.png

    kinora generate --image face.png --audio voice.wav -o talk.mp4

    kinora generate -i me.jpg -a talk.m4a -o me.mp4 --model liveavatar-14b --checkpoint Wan2.2-S2V-14B

    The file is playable while it is written. Ctrl-C finishes it with what was made so far; twice, it stops at once.
    """
    check_output(output)
    check_overwrite(output, overwrite)
    chosen_size = parse_size(size)
    picture = read_image(image)
    samples = read_audio(audio, MODEL_RATE)
    if is_silent(samples) and not allow_silence:
        raise InputError(
            f"{audio} is silent (nothing above {SILENCE_DBFS:.0f} dB of full scale); "
            "give a voice that can be heard, or pass --allow-silence"
        )
    from ... import runtime  # the models are imported only once the input is known to be good

    with FrameProgress(f"loading {model}") as progress:
        try:
            avatar = runtime.load(model, checkpoint=checkpoint, placement=placement, device=device)
            progress.say("reading the picture")
            session = avatar.stream(picture, prompt=prompt, seed=seed, steps=steps, size=chosen_size)
        except KeyboardInterrupt:
            stopped, told = True, "nothing was written"
        else:
            with session:
                stopped, told = _record(session, samples, audio, output, progress)
    print(f"stopped: {told}" if stopped else told)
    if stopped:
        raise typer.Exit(STOPPED)


def _record(
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
