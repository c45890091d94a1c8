"""The embedded model: its size, its bytes, and that the mouth at t belongs to the sound at t in the written file.

The bounds hold for any trained model of this recipe; how good the shipped one is stands in docs/tiny.md.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from kinora.bench.tiny import as_video, best_lag, correlation
from kinora.runtime import Avatar, Video, load
from kinora.runtime.cli import main
from kinora.runtime.faces import motion_from_audio, mouth_opening
from kinora.runtime.load import TINY_FOLDER
from media_files import write_sound
from safetensors import safe_open

pytest.importorskip("av")
from kinora.runtime.media import Clip, read_audio, read_video

RATE, FPS = 16_000, 25
SEED = 5
SIDE = 192
EXAMPLES = Path(__file__).parent.parent / "examples"
FACE = EXAMPLES / "faces" / "mira.png"
SPOKEN = 0.6  # seconds of speech before the silence
BURST_START = 1.5  # seconds of silence before the burst


def speech(start: float, end: float) -> np.ndarray:
    """A stretch of an example voice, in seconds; it speaks all the time between 0.5 s and 4 s."""
    voice = read_audio(EXAMPLES / "voices" / "welcome.flac", RATE)
    return voice[round(start * RATE) : round(end * RATE)]


def opening_of(frames: np.ndarray) -> np.ndarray:
    """Mouth opening in pixels [T] of frames uint8 [T, H, W, 3]."""
    return mouth_opening(as_video(frames)).double().numpy()


def drawn_opening(sound: np.ndarray) -> np.ndarray:
    """The renderer's own opening [T] for a sound."""
    return motion_from_audio(torch.from_numpy(sound)).openness[0].double().numpy()


def onset(curve: np.ndarray) -> int:
    """First frame at 30 % of the widest opening."""
    return int(np.argmax(curve >= 0.3 * curve.max()))


@dataclass(frozen=True)
class Written:
    """What `kinora generate` made of `sound`: its exit code and the decoded file."""

    code: int
    sound: np.ndarray
    clip: Clip


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    return speech(0.5, 3.5)


@pytest.fixture(scope="module")
def talk(avatar: Avatar, voice: np.ndarray) -> Video:
    return avatar.generate(FACE, voice, seed=SEED)


@pytest.fixture(scope="module")
def spoken_then_silent(avatar: Avatar, voice: np.ndarray) -> np.ndarray:
    """Frames of another seed: the start of the voice, then silence."""
    with avatar.stream(FACE, seed=SEED + 1) as session:
        sound = np.concatenate((voice[: round(SPOKEN * RATE)], np.zeros(round(1.4 * RATE), np.float32)))
        return session.feed(sound)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """1.5 s of silence, then a burst of speech, through the program and back from its file."""
    folder = tmp_path_factory.mktemp("written")
    sound = np.concatenate((np.zeros(round(BURST_START * RATE), np.float32), speech(0.5, 1.4)))
    write_sound(folder / "burst.wav", sound, "pcm_s16le", RATE, "mono")
    job = ["--image", str(FACE), "--audio", str(folder / "burst.wav"), "-o", str(folder / "talk.mp4")]
    code = main(["generate", *job, "--seed", str(SEED), "--device", "cpu"])
    return Written(code, sound, read_video(folder / "talk.mp4", RATE))


def test_the_model_is_small() -> None:
    weights = TINY_FOLDER / "tiny.safetensors"
    assert weights.stat().st_size <= 24e6
    with safe_open(weights, "pt") as file:
        parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    assert 5e6 <= parameters <= 15e6


def test_the_model_runs_as_documented(avatar: Avatar) -> None:
    assert avatar.size is not None and 192 <= avatar.size <= 256
    assert (avatar.fps, avatar.mode.steps, avatar.mode.aligned) == (FPS, 4, True)


def test_the_program_writes_a_talking_video(written: Written) -> None:
    assert written.code == 0
    clip, seconds = written.clip, len(written.sound) / RATE
    assert clip.fps == FPS and clip.frames.shape == (round(seconds * FPS), SIDE, SIDE, 3)
    assert clip.audio is not None and len(clip.audio) / RATE == pytest.approx(seconds, abs=0.05)


def test_the_sound_of_the_file_starts_with_its_first_frame(written: Written) -> None:
    """Cross-correlation of the decoded sound with the one that was given peaks within 5 ms of no shift."""
    assert written.clip.audio is not None
    length = 2 * len(written.sound)
    heard, given = (np.fft.rfft(x[: len(written.sound)], length) for x in (written.clip.audio, written.sound))
    shift = int(np.argmax(np.fft.irfft(heard * given.conj(), length)))
    late = shift if shift < length // 2 else shift - length
    assert abs(late) <= 0.005 * RATE


def test_the_mouth_at_t_belongs_to_the_sound_at_t(written: Written) -> None:
    """Through features, model, dropped frames, encoder and muxer: the mouth opens where the drawn one does."""
    opening, drawn = opening_of(written.clip.frames), drawn_opening(written.sound)
    assert onset(drawn) == pytest.approx(BURST_START * FPS, abs=4)  # the sound itself starts there
    assert abs(onset(opening) - onset(drawn)) <= 2
    assert correlation(opening, drawn) >= 0.6


def test_the_mouth_follows_the_voice(talk: Video, voice: np.ndarray) -> None:
    opening, drawn = opening_of(talk.frames), drawn_opening(voice)
    assert len(opening) == len(drawn) == 3 * FPS
    assert correlation(opening, drawn) >= 0.6
    assert abs(best_lag(opening, drawn)) <= 1
    assert correlation(opening, drawn[::-1].copy()) < 0.5  # what the measure says of a sound that does not belong


def test_the_picture_is_kept(talk: Video) -> None:
    """Corners of the picture never move: the background stays what it was."""
    assert talk.frames.shape == (3 * FPS, SIDE, SIDE, 3)
    corners = as_video(talk.frames)[:, :, :24, :24]
    assert (corners - corners[:, :1]).abs().mean(dim=(0, 2, 3)).max() < 0.05


def test_pieces_of_any_size_and_a_second_run_give_the_same_bytes(
    avatar: Avatar, talk: Video, voice: np.ndarray
) -> None:
    """A stream that has heard the start of a voice has shown exactly what the whole video of that voice shows."""
    sizes = np.random.default_rng(0).integers(1, 4000, 100)
    cuts = np.cumsum(sizes)[np.cumsum(sizes) < RATE]
    with avatar.stream(FACE, seed=SEED) as session:
        frames = np.concatenate([session.feed(piece) for piece in np.split(voice[:RATE], cuts)])
    assert len(frames) == 21  # two blocks of 12 less the 3 that are never shown
    assert np.array_equal(frames, talk.frames[:21])


def test_another_seed_gives_other_bytes(spoken_then_silent: np.ndarray, talk: Video) -> None:
    assert not np.array_equal(spoken_then_silent[:9], talk.frames[:9])


def test_silence_keeps_the_mouth_shut(spoken_then_silent: np.ndarray) -> None:
    """Measured before the encoder, whose chroma at half resolution lets the lips bleed into the mouth."""
    opening = opening_of(spoken_then_silent)
    spoken, silent = opening[: round(SPOKEN * FPS)], opening[round(SPOKEN * FPS) + 4 :]  # it takes 0.1 s to shut
    assert len(silent) >= FPS and spoken.max() > 4.0  # pixels
    assert silent.max() < spoken.max() / 5
