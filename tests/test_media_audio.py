"""Sound: every codec keeps its time, channels are mixed without clipping, bad files say what is wrong."""

import numpy as np
import pytest
from kinora.runtime.errors import InputError
from media_files import click_at, onset, quarters, write_sound

av = pytest.importorskip("av")
from kinora.runtime.media import (  # noqa: E402
    VideoWriter,
    is_silent,
    iter_audio,
    peak_dbfs,
    read_audio,
    read_video,
    write_image,
)


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


@pytest.mark.parametrize("channels", [2, 3, 6, 8, 16])
def test_channels_are_mixed_without_clipping(tmp_path, channels):
    """Stereo is the mean of both sides; any number of unnamed channels too."""
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
