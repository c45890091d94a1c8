"""Media: what is read equals what was stored, sound and picture stay together, bad files say what is wrong."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinora.runtime.errors import InputError, OutputError
from kinora.runtime.media import (
    VideoWriter,
    is_silent,
    iter_audio,
    iter_frames,
    peak_dbfs,
    read_audio,
    read_image,
    read_video,
    write_image,
)
from kinora.runtime.media import images as images_module
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters() -> np.ndarray:
    """Four coloured quarters, so that every turn and flip is told from the others: uint8 [40, 60, 3]."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20, :30], picture[:20, 30:], picture[20:, :30], picture[20:, 30:] = RED, GREEN, BLUE, WHITE
    return picture


def write_sound(path: Path, samples: np.ndarray, codec: str, rate: int, layout: str = "mono") -> None:
    """Encode float32 [n], the same in every channel, with PyAV; the container follows the file name."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if not len(samples):
            container.start_encoding()  # a header with nothing after it
            return
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate)
        channels = stream.codec_context.layout.nb_channels
        frame = av.AudioFrame.from_ndarray(np.repeat(samples[None], channels, axis=0), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def click_at(seconds: float, length: float, rate: int) -> np.ndarray:
    """Silence of `length` seconds with a 2 ms click that starts at `seconds`."""
    samples = np.zeros(round(length * rate), np.float32)
    start = round(seconds * rate)
    samples[start : start + rate // 500] = 0.8
    return samples


def onset(samples: np.ndarray, rate: int) -> float:
    """Seconds at which the loudest event starts."""
    level = np.abs(samples)
    return int(np.argmax(level > 0.4 * level.max())) / rate


# pictures


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_pictures_survive_a_round_trip(tmp_path, name):
    write_image(tmp_path / "new" / name, quarters())
    read = read_image(tmp_path / "new" / name)
    assert read.dtype == np.uint8 and read.shape == (40, 60, 3)
    assert np.abs(read[5:15, 5:25].astype(int) - RED).max() < 8
    assert np.abs(read[25:35, 35:55].astype(int) - WHITE).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = Image.fromarray(quarters())
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Pillow transpose that a camera of this orientation did
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "photo.png"), quarters())


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:10] = (255, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "logo.webp", lossless=True)
    read = read_image(tmp_path / "logo.webp")
    assert tuple(read[15, 15]) == WHITE
    assert np.abs(read[5, 5].astype(int) - (255, 127, 127)).max() <= 1


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    picture = Image.fromarray(quarters())
    ramp = np.repeat(np.linspace(0, 65535, 32)[None], 32, axis=0)
    picture.quantize(8).save(tmp_path / "palette.png")
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("1").save(tmp_path / "bits.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    palette = picture.quantize(8)
    palette.save(tmp_path / "hole.png", transparency=palette.getpixel((5, 5)))

    assert np.array_equal(read_image(tmp_path / "palette.png"), quarters())
    assert tuple(read_image(tmp_path / "grey.png")[5, 5]) == (76, 76, 76)  # ITU-R 601 luma of red
    assert tuple(read_image(tmp_path / "bits.png")[30, 45]) == WHITE
    assert np.abs(read_image(tmp_path / "cmyk.jpg")[5, 5].astype(int) - RED).max() < 8
    assert np.array_equal(read_image(tmp_path / "deep.png")[0, :, 0], np.round(ramp[0] // 1 / 257).astype(np.uint8))
    assert tuple(read_image(tmp_path / "hole.png")[5, 5]) == WHITE
    assert tuple(read_image(tmp_path / "hole.png")[5, 45]) == GREEN


def test_broken_exif_does_not_cost_the_picture(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "photo.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(read_image(tmp_path / "photo.png"), quarters())


def test_bad_pictures_say_what_to_do(tmp_path):
    Image.fromarray(quarters()).resize((600, 400)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "notes.png").write_text("not a picture at all")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (8, 300)).save(tmp_path / "thin.png")
    Image.new("1", (16_385, 20)).save(tmp_path / "wide.png")
    Image.new("1", (9_000, 9_000)).save(tmp_path / "big.png")
    Image.new("F", (20, 20)).save(tmp_path / "float.tiff")
    for name, told in {
        "missing.png": "no such picture",
        "cut.jpg": "cut off",
        "notes.png": "not a picture",
        "empty.png": "empty file",
        "thin.png": "at least 16",
        "wide.png": "scale it down",
        "big.png": "scale it down",
        "float.tiff": "8 bits",
        ".": "is a folder",
    }.items():
        with pytest.raises(InputError, match=told):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match=r"\.png"):
        write_image(tmp_path / "face.xyz", quarters())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_image(tmp_path / "file" / "face.png", quarters())


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    Image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(images_module, "_upright", lambda image: pytest.fail("the pixels were decoded"))
    with pytest.raises(InputError, match="scale it down"):
        read_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(InputError, match="absurdly many pixels"):
        read_image(tmp_path / "bomb.png")


# sound


@pytest.mark.parametrize("target", [16_000, 48_000])
@pytest.mark.parametrize(
    "name, codec, rate, layout, tolerance",
    [
        ("a.wav", "pcm_s16le", 44_100, "stereo", 0.001),
        ("b.wav", "pcm_f32le", 48_000, "mono", 0.001),
        ("c.wav", "pcm_u8", 8_000, "mono", 0.001),
        ("d.wav", "pcm_s24le", 96_000, "5.1", 0.001),
        ("a.flac", "flac", 44_100, "stereo", 0.001),
        ("b.m4a", "alac", 22_050, "mono", 0.001),
        ("a.mp3", "libmp3lame", 44_100, "stereo", 0.001),
        ("b.mp3", "libmp3lame", 22_050, "mono", 0.001),
        ("a.m4a", "aac", 48_000, "stereo", 0.001),
        ("a.ogg", "libopus", 48_000, "stereo", 0.001),
        ("a.webm", "libopus", 48_000, "mono", 0.001),
        ("a.aac", "aac", 44_100, "mono", 0.030),  # these two record no encoder delay
        ("a.avi", "libmp3lame", 44_100, "mono", 0.030),
    ],
)
def test_sound_keeps_its_time_in_every_codec(tmp_path, name, codec, rate, layout, tolerance, target):
    write_sound(tmp_path / name, click_at(0.5, 1.3, rate), codec, rate, layout)
    samples = read_audio(tmp_path / name, target)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert onset(samples, target) == pytest.approx(0.5, abs=tolerance)
    if tolerance == 0.001:
        assert abs(len(samples) - round(1.3 * target)) <= 1
    else:
        assert round(1.3 * target) <= len(samples) <= 1.4 * target


def test_no_tail_is_lost_in_resampling(tmp_path):
    time = np.arange(44_100) / 44_100
    write_sound(tmp_path / "tone.wav", (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), "pcm_f32le", 44_100)
    samples = read_audio(tmp_path / "tone.wav")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert len(samples) == 16_000
    assert np.abs(samples - expected)[100:-100].max() < 1e-3
    assert np.abs(samples - expected)[-100:].max() < 0.1


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_channels_are_mixed_without_clipping(tmp_path, channels):
    """Stereo is the mean of both sides; three unnamed channels too; surround keeps its centre audible."""
    rate, value = 16_000, 0.9
    data = np.zeros((channels, rate), np.float32)
    data[min(2, channels - 1)] = value
    header = b"RIFF\0\0\0\0WAVEfmt " + (16).to_bytes(4, "little")
    header += b"".join(
        number.to_bytes(size, "little")
        for number, size in [(3, 2), (channels, 2), (rate, 4), (rate * channels * 4, 4), (channels * 4, 2), (32, 2)]
    )
    body = np.ascontiguousarray(data.T).tobytes()
    (tmp_path / "a.wav").write_bytes(header + b"data" + len(body).to_bytes(4, "little") + body)
    samples = read_audio(tmp_path / "a.wav")
    assert len(samples) == rate
    assert samples[rate // 2] == pytest.approx(value / channels, rel=1e-5)


def test_surround_keeps_the_centre_where_speech_is(tmp_path):
    with av.open(str(tmp_path / "film.wav"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16_000, layout="5.1")
        data = np.zeros((1, 16_000 * 6), np.float32)
        data[0, 2::6] = 0.5  # the third channel of 5.1 is the centre
        frame = av.AudioFrame.from_ndarray(data, format="flt", layout="5.1")
        frame.sample_rate, frame.pts = 16_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert read_audio(tmp_path / "film.wav")[8_000] == pytest.approx(0.5 * 2**-0.5, rel=1e-3)


def test_reading_in_pieces_gives_the_same_samples(tmp_path):
    write_sound(tmp_path / "a.m4a", click_at(0.2, 3.0, 44_100), "aac", 44_100, "stereo")
    pieces = list(iter_audio(tmp_path / "a.m4a", 24_000))
    assert len(pieces) > 10
    assert np.array_equal(np.concatenate(pieces), read_audio(tmp_path / "a.m4a", 24_000))


@pytest.mark.parametrize(
    "name, codec", [("a.wav", "pcm_s16le"), ("a.flac", "flac"), ("a.m4a", "aac"), ("a.mp3", "libmp3lame")]
)
def test_cut_off_sound_is_an_error(tmp_path, name, codec):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8 * 44_100).astype(np.float32)
    write_sound(tmp_path / name, noise, codec, 44_100)
    data = (tmp_path / name).read_bytes()
    (tmp_path / f"cut_{name}").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cut off"):
        read_audio(tmp_path / f"cut_{name}")


def test_bad_sound_says_what_to_do(tmp_path):
    (tmp_path / "notes.wav").write_text("these are words, not sound\n" * 100)
    (tmp_path / "empty.wav").touch()
    write_sound(tmp_path / "none.wav", np.zeros(0, np.float32), "pcm_s16le", 16_000)
    write_image(tmp_path / "face.png", quarters())
    write_sound(tmp_path / "nan.wav", np.full(1600, np.nan, np.float32), "pcm_f32le", 16_000)
    with VideoWriter(tmp_path / "mute.mp4", 32, 32, audio_rate=None) as writer:
        writer.write_frames(np.zeros((5, 32, 32, 3), np.uint8))
    for name, told in {
        "missing.wav": "no such sound file",
        "notes.wav": "no sound",
        "empty.wav": "empty file",
        "none.wav": "nothing in it|no sound file that can be read",
        "face.png": "has no sound",
        "nan.wav": "not finite",
        "mute.mp4": "has no sound",
        ".": "is a folder",
    }.items():
        with pytest.raises(InputError, match=told):
            read_audio(tmp_path / name)


def test_file_names_are_never_taken_for_addresses(tmp_path):
    write_sound(tmp_path / "talk.wav", click_at(0.1, 0.5, 16_000), "pcm_s16le", 16_000)
    odd = (tmp_path / "talk.wav").rename(tmp_path / "tcp:10.30 %d?.wav")
    assert len(read_audio(odd)) == 8_000
    with VideoWriter(tmp_path / "a:b %03d.mp4", 32, 32) as writer:
        writer.write_frames(np.zeros((2, 32, 32, 3), np.uint8))
    assert len(read_video(tmp_path / "a:b %03d.mp4").frames) == 2


def test_silence_is_measured_against_full_scale():
    quiet = np.full(100, 10 ** (-61 / 20), np.float32)
    assert is_silent(np.zeros(0, np.float32)) and is_silent(quiet) and not is_silent(quiet * 2)
    assert peak_dbfs(np.array([0.1, -1.0], np.float32)) == pytest.approx(0)
    assert peak_dbfs(np.zeros(3, np.float32)) == -np.inf


# video


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


def test_bad_writers_say_what_to_do(tmp_path):
    for path, told in [(tmp_path, "is a folder"), (tmp_path / "a.avi", r"end the name with \.mp4")]:
        with pytest.raises(InputError, match=told):
            VideoWriter(path, 32, 32)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        VideoWriter(tmp_path / "file" / "a.mp4", 32, 32)
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
