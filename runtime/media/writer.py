"""Frames and sound -> an MP4 file (H.264 + AAC), with both on one clock."""

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from ..errors import InputError, OutputError
from ..outputs import check_file

# The sound delay that AAC needs is written once the first fragment is known; at the end the fragments become one
# ordinary movie. A file that was cut off keeps its fragments.
FRAGMENTED = "frag_keyframe+delay_moov+default_base_moof+hybrid_fragmented"
WHOLE = "faststart"
AUDIO_RATES = sorted(av.codec.Codec("aac", "w").audio_rates or ())
BT709 = 1  # the number of BT.709 in ISO/IEC 23091-2: matrix, primaries and transfer


class VideoWriter:
    """Writes an MP4: frame i is shown at i / fps seconds, sample n is heard at n / audio_rate seconds.

    Args:
        path: the file, replaced if it exists; its folder is made. Must end with .mp4.
        width, height: size of the frames in pixels; an odd side gets its last row or column repeated once.
        fps: frames per second.
        audio_rate: samples per second of the sound; None for a video without sound.
        fragmented: write a playable piece every second, so that a run that is killed leaves what it had written;
            otherwise the file appears under its name when it is complete, ready for progressive download.
        crf: quality of x264, lower is better.

    As a context manager it finishes the file also when the block raises. A writer that got no frame leaves no file of
    its own, and one that got nothing at all leaves the file that was there before.
    Errors: InputError for a name, `fps` or `audio_rate` that an MP4 cannot have, OutputError where none can be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: int | float | Fraction = 25,
        audio_rate: int | None = 16_000,
        fragmented: bool = False,
        crf: int = 18,
    ) -> None:
        self.path = Path(path)
        self.width, self.height = width, height
        self.fps = Fraction(fps).limit_denominator(1001)
        self.audio_rate = audio_rate
        self.frames_written = 0
        self.samples_written = 0
        self.closed = False
        self._started = False
        self._pending = np.zeros(0, np.float32)
        check_output(self.path)
        if not self.fps > 0:
            raise InputError(f"{fps} frames a second cannot be written; pass a number above 0, such as 25")
        if audio_rate and audio_rate not in AUDIO_RATES:
            raise InputError(f"AAC has no {audio_rate} samples a second; resample to one of {AUDIO_RATES}")
        self._target = self.path if fragmented else self.path.with_name(f".{self.path.stem}.{os.getpid()}.part.mp4")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(
                f"file:{self._target}",
                "w",
                format="mp4",
                options={"movflags": FRAGMENTED if fragmented else WHOLE, "flush_packets": "1"},
            )
        except (OSError, av.error.FFmpegError) as error:
            raise self._failure(error) from error
        self._video = self._add_video(crf, fragmented)
        self._audio = self._add_audio(audio_rate) if audio_rate else None

    def write_frames(self, frames: np.ndarray) -> None:
        """Append uint8 RGB frames [T, H, W, 3]. Raises OutputError when the file cannot be written."""
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            found = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"frames are {found}; this writer takes uint8 [T, {self.height}, {self.width}, 3]")
        self._check_open()
        odd_rows, odd_columns = self.height % 2, self.width % 2
        for rgb in frames:
            if odd_rows or odd_columns:
                rgb = np.pad(rgb, ((0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = self.frames_written, 1 / self.fps
            self._mux(self._video.encode(frame))
            self.frames_written += 1

    def write_audio(self, samples: np.ndarray) -> None:
        """Append float32 mono samples [n] at `audio_rate`; 1 is full scale. Raises OutputError like `write_frames`."""
        samples = np.asarray(samples)
        if samples.dtype != np.float32 or samples.ndim != 1:
            raise ValueError(f"sound is {samples.dtype} {list(samples.shape)}; this writer takes float32 [n]")
        if self._audio is None:
            raise ValueError("this writer was made without sound: pass audio_rate")
        self._check_open()
        self._pending = np.concatenate([self._pending, samples])
        size = self._audio.codec_context.frame_size
        while len(self._pending) >= size:
            piece, self._pending = self._pending[:size], self._pending[size:]
            self._encode_sound(piece)

    def close(self) -> None:
        """Finish the file; a second call does nothing. Raises OutputError when the file cannot be written."""
        if self.closed:
            return
        self.closed = True
        try:
            if self.frames_written:
                if len(self._pending):
                    self._encode_sound(self._pending)
                self._mux(self._video.encode(None))
                if self._audio is not None:
                    self._mux(self._audio.encode(None))
            self._container.close()
            if self.frames_written:
                os.replace(self._target, self.path)
        except (OSError, av.error.FFmpegError) as error:
            raise self._failure(error) from error
        finally:
            # a writer in place that wrote nothing has not touched what was there before
            if self._target != self.path or (self._started and not self.frames_written):
                self._target.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_video(self, crf: int, fragmented: bool) -> VideoStream:
        options = {"preset": "veryfast", "crf": str(crf)}
        if fragmented:
            options["tune"] = "zerolatency"  # frames held back by the encoder would be lost with the process
        stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        context = stream.codec_context
        context.width, context.height = self.width + self.width % 2, self.height + self.height % 2
        context.pix_fmt = "yuv420p"
        context.time_base = 1 / self.fps
        context.gop_size = max(round(self.fps), 1)  # a key frame, and a fragment, a second
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
        return stream

    def _add_audio(self, rate: int) -> AudioStream:
        stream = self._container.add_stream("aac", rate=rate, layout="mono")
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.bit_rate = min(4 * rate, 128_000)
        stream.codec_context.open()  # the frame size is known from here on
        return stream

    def _encode_sound(self, samples: np.ndarray) -> None:
        assert self._audio is not None and self.audio_rate is not None
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = self.audio_rate, self.samples_written
        frame.time_base = Fraction(1, self.audio_rate)
        self.samples_written += len(samples)  # before the encoder has them: after Ctrl-C no time is used twice
        self._mux(self._audio.encode(frame))

    def _mux(self, packets: list[av.Packet]) -> None:
        try:
            if packets and not self._started:
                self._container.start_encoding()  # opens the file
                self._started = True
            self._container.mux(packets)
        except (OSError, av.error.FFmpegError) as error:
            raise self._failure(error) from error

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.path} was closed already")

    def _failure(self, error: OSError | av.error.FFmpegError) -> OutputError:
        return OutputError(f"cannot write {self.path}: {error.strerror or error}")


def check_output(path: Path) -> None:
    """Raises InputError for a name that no MP4 can be written under, OutputError where none can be written."""
    check_file(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a video file in it, such as {path / 'talk.mp4'}")
    if path.suffix.lower() != ".mp4":
        raise InputError(f"cannot write a video as {path.name!r}; end the name with .mp4")
