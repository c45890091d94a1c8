"""Video: sound and picture stay together, killed or full, and bad files say what is wrong."""

import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinora.runtime.errors import InputError, OutputError
from media_files import click_at, onset, quarters, write_sound

av = pytest.importorskip("av")
from kinora.runtime.media import VideoWriter, iter_frames, read_video  # noqa: E402


def flash_and_click(frames: int, at: int, height: int, width: int, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Dark frames with one white, and a sound with a click at the same moment."""
    video = np.full((frames, height, width, 3), 20, np.uint8)
    video[at] = 235
    return video, click_at(at / 25, frames / 25, rate)


@pytest.mark.parametrize("fragmented", [False, True])
@pytest.mark.parametrize("size", [(96, 128), (95, 127)])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_flash_and_click_stay_together(tmp_path, fragmented, size, rate):
    height, width = size
    video, sound = flash_and_click(70, 40, height, width, rate)
    path = tmp_path / "talk.mp4"
    with VideoWriter(path, width, height, audio_rate=rate, fragmented=fragmented) as writer:
        for start in range(0, 70, 12):  # as a session delivers: a block of frames with its sound
            writer.write_frames(video[start : start + 12])
            writer.write_audio(sound[start * rate // 25 : (start + 12) * rate // 25])
    clip = read_video(path, rate)
    assert clip.fps == 25 and clip.frames.shape == (70, height + height % 2, width + width % 2, 3)
    assert clip.audio is not None and len(clip.audio) == len(sound)
    brightness = clip.frames.mean(axis=(1, 2, 3))
    assert int(brightness.argmax()) == 40 and brightness[39] < 60 and brightness[41] < 60
    assert onset(clip.audio, rate) == pytest.approx(40 / 25, abs=0.005)
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk.mp4"]  # no temporary file stays
    assert np.array_equal(np.stack(list(iter_frames(path))), clip.frames)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_pieces_do_not_change_the_file(tmp_path, sound_pieces, frame_pieces):
    rng = np.random.default_rng(0)
    sound = rng.uniform(-0.5, 0.5, sum(sound_pieces)).astype(np.float32)
    video = rng.integers(0, 255, (sum(frame_pieces), 32, 48, 3), dtype=np.uint8)
    for name, sounds, frames in [("a.mp4", sound_pieces, frame_pieces), ("b.mp4", [len(sound)], [len(video)])]:
        with VideoWriter(tmp_path / name, 48, 32) as writer:
            for part in np.split(video, np.cumsum(frames)[:-1]):
                writer.write_frames(part)
            for part in np.split(sound, np.cumsum(sounds)[:-1]):
                writer.write_audio(part)
        assert writer.frames_written == len(video) and writer.samples_written == len(sound)
    a, b = read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4")
    assert np.array_equal(a.frames, b.frames)
    assert a.audio is not None and b.audio is not None and np.array_equal(a.audio, b.audio)


def test_colours_survive(tmp_path):
    colours = np.array([[200, 60, 30], [20, 90, 220], [40, 200, 80], [230, 200, 180]], np.uint8)
    frames = np.repeat(np.repeat(colours, 32, axis=0)[None, None], 32, axis=1)  # four patches [1, 32, 128, 3]
    with VideoWriter(tmp_path / "a.mp4", 128, 32, audio_rate=None) as writer:
        writer.write_frames(np.repeat(frames, 5, axis=0))
    read = read_video(tmp_path / "a.mp4").frames[2, 16, 16::32]
    assert np.abs(read.astype(int) - colours).max() <= 5
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


CRASH = """
import os, signal, sys
import numpy as np
from kinora.runtime.media import VideoWriter
writer = VideoWriter(sys.argv[1], 64, 48, fragmented=True)
for frame in range(200):
    writer.write_frames(np.full((1, 48, 64, 3), frame, np.uint8))
    writer.write_audio(np.full(640, 0.1, np.float32))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_a_playable_file(tmp_path):
    process = subprocess.run([sys.executable, "-c", CRASH, tmp_path / "live.mp4"], check=False)
    assert process.returncode == -9
    clip = read_video(tmp_path / "live.mp4")
    assert len(clip.frames) >= 150  # 8 s were written, at most the last two seconds are lost
    assert np.abs(clip.frames.mean(axis=(1, 2, 3)) - np.arange(len(clip.frames))).max() < 4
    assert clip.audio is not None and abs(len(clip.audio) / 16_000 - len(clip.frames) / 25) < 1


@pytest.mark.parametrize("fragmented", [False, True])
def test_an_exception_still_finishes_the_file(tmp_path, fragmented):
    with (
        pytest.raises(RuntimeError, match="model broke"),
        VideoWriter(tmp_path / "a.mp4", 32, 32, fragmented=fragmented) as writer,
    ):
        writer.write_frames(np.zeros((30, 32, 32, 3), np.uint8))
        writer.write_audio(np.zeros(19_200, np.float32))
        raise RuntimeError("model broke")
    assert len(read_video(tmp_path / "a.mp4").frames) == 30
    writer.close()  # a second time is harmless
    with pytest.raises(ValueError, match="closed"):
        writer.write_frames(np.zeros((1, 32, 32, 3), np.uint8))


def test_sound_that_was_cut_off_is_not_encoded_twice(tmp_path, monkeypatch):
    sound = np.zeros(4 * 1024, np.float32)
    with VideoWriter(tmp_path / "a.mp4", 32, 32, fragmented=True) as writer:
        writer.write_frames(np.zeros((5, 32, 32, 3), np.uint8))
        mux, calls = writer._mux, []

        def interrupted(packets):
            mux(packets)
            calls.append(packets)
            if len(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(writer, "_mux", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.write_audio(sound)
        writer.write_audio(sound)
    assert len(read_video(tmp_path / "a.mp4").frames) == 5


@pytest.mark.parametrize("fragmented", [False, True])
def test_without_frames_no_file_is_left(tmp_path, fragmented):
    with VideoWriter(tmp_path / "a.mp4", 32, 32, fragmented=fragmented) as writer:
        writer.write_audio(np.zeros(5000, np.float32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fragmented", [False, True])
def test_a_writer_that_got_nothing_keeps_the_file_before_it(tmp_path, fragmented):
    (tmp_path / "a.mp4").write_text("precious")
    with VideoWriter(tmp_path / "a.mp4", 32, 32, fragmented=fragmented):
        pass
    assert (tmp_path / "a.mp4").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_a_finished_streamed_file_is_an_ordinary_movie(tmp_path):
    """Once closed, the index at the file's end lists every frame, as players that know no fragments need."""
    with VideoWriter(tmp_path / "a.mp4", 32, 32, fragmented=True) as writer:
        writer.write_frames(np.zeros((60, 32, 32, 3), np.uint8))
        writer.write_audio(np.zeros(38_400, np.float32))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 60


def test_a_whole_file_starts_with_its_index(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 32, 32) as writer:
        writer.write_frames(np.zeros((60, 32, 32, 3), np.uint8))
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


FULL = """
import resource, sys
import numpy as np
from kinora.runtime.errors import OutputError
from kinora.runtime.media import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
noise = np.random.default_rng(0).integers(0, 255, (5, 96, 128, 3), dtype=np.uint8)
try:
    with VideoWriter(sys.argv[1], 128, 96, fragmented=sys.argv[2] == "True") as writer:
        for _ in range(40):
            writer.write_frames(noise)
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("fragmented", [False, True])
def test_a_full_disk_is_told(tmp_path, fragmented):
    command = [sys.executable, "-c", FULL, str(tmp_path / "a.mp4"), str(fragmented)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.stdout.startswith(f"cannot write {tmp_path / 'a.mp4'}: "), process.stderr


def test_bad_writers_say_what_to_do(tmp_path, monkeypatch):
    for path, told in [(tmp_path, "is a folder"), (tmp_path / "a.avi", r"end the name with \.mp4")]:
        with pytest.raises(InputError, match=told):
            VideoWriter(path, 32, 32)
    for fps in (0, -25):
        with pytest.raises(InputError, match="frames a second"):
            VideoWriter(tmp_path / "a.mp4", 32, 32, fps)
    with pytest.raises(InputError, match="AAC has no 16001 samples a second; resample to one of"):
        VideoWriter(tmp_path / "a.mp4", 32, 32, audio_rate=16_001)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        VideoWriter(tmp_path / "file" / "a.mp4", 32, 32)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)  # root may write everywhere
        (tmp_path / "old.mp4").touch()
        for name in ("old.mp4", "new.mp4", "new/new.mp4"):
            with pytest.raises(OutputError, match="no permission"):
                VideoWriter(tmp_path / name, 32, 32)
    with VideoWriter(tmp_path / "a.mp4", 32, 32, audio_rate=None) as writer:
        for frames in (np.zeros((1, 32, 32, 3), np.float32), np.zeros((32, 32, 3), np.uint8)):
            with pytest.raises(ValueError, match="takes uint8"):
                writer.write_frames(frames)
        with pytest.raises(ValueError, match="without sound"):
            writer.write_audio(np.zeros(10, np.float32))


def test_bad_videos_say_what_to_do(tmp_path):
    write_sound(tmp_path / "song.wav", click_at(0.1, 0.5, 16_000), "pcm_s16le", 16_000)
    (tmp_path / "broken.mp4").write_bytes(os.urandom(5000))
    for name, told in {"song.wav": "no video", "broken.mp4": "damaged", "missing.mp4": "no such video"}.items():
        with pytest.raises(InputError, match=told):
            read_video(tmp_path / name)


def test_late_sound_is_padded_to_the_picture(tmp_path):
    """A camera's sound often starts after the picture: sample 0 belongs to frame 0 all the same."""
    with av.open(str(tmp_path / "cam.mkv"), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for index in range(25):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(video.encode(frame))
        sound = np.full((1, 8_000), 16_000, np.int16)
        late = av.AudioFrame.from_ndarray(sound, format="s16", layout="mono")
        late.sample_rate, late.pts, late.time_base = 16_000, 4_000, Fraction(1, 16_000)
        container.mux(audio.encode(late))
        container.mux([*video.encode(None), *audio.encode(None)])
    clip = read_video(tmp_path / "cam.mkv")
    assert clip.audio is not None and len(clip.audio) == 12_000
    assert onset(clip.audio, 16_000) == pytest.approx(0.25, abs=0.001)


def test_phone_rotation_is_applied(tmp_path):
    frames = np.repeat(quarters()[None], 3, axis=0)
    with VideoWriter(tmp_path / "a.mp4", 60, 40, audio_rate=None) as writer:
        writer.write_frames(frames)
    data = (tmp_path / "a.mp4").read_bytes()
    numbers = [(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000), (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)]
    identity, clockwise = (b"".join(n.to_bytes(4, "big", signed=True) for n in matrix) for matrix in numbers)
    track = data.index(b"tkhd")
    assert identity in data[track:]
    (tmp_path / "a.mp4").write_bytes(data[:track] + data[track:].replace(identity, clockwise, 1))
    read = read_video(tmp_path / "a.mp4").frames
    assert read.shape == (3, 60, 40, 3)
    expected = np.rot90(quarters(), -1)  # shown a quarter turn clockwise
    assert np.abs(read[1, 10::40, 10::20].astype(int) - expected[10::40, 10::20]).max() < 40
