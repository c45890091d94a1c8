"""`kinora generate`: what it writes, how it stops, and that every bad input is one clear line and leaves no file."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cli_doubles import BLOCK, FPS, RATE, FakeAvatar, FakeSession, run
from kinora import runtime
from media_files import write_sound
from PIL import Image
from safetensors.numpy import save_file
from small_model import write_model

pytest.importorskip("av")
from kinora.runtime.media import read_video

JOB = ["generate", "--image", "face.png", "--audio", "voice.wav", "-o", "talk.mp4"]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with face.png and voice.wav (1.3 s, a beep from 0.8 s to 1.0 s), made the current one."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 80), (200, 150, 120)).save("face.png")
    voice = np.zeros(round(1.3 * 44_100), np.float32)
    voice[35_280:44_100] = 0.6 * np.sin(np.arange(8_820) / 10)
    write_sound(Path("voice.wav"), voice, "pcm_s16le", 44_100, "stereo")
    return tmp_path


@pytest.fixture
def fake(monkeypatch):
    """Puts a fake avatar behind `kinora.runtime.load`; call it to choose the session."""

    def install(session: FakeSession) -> FakeAvatar:
        avatar = FakeAvatar(session)
        monkeypatch.setattr(runtime, "load", lambda *_, **options: avatar)
        return avatar

    return install


def test_generate_writes_the_video_with_its_sound(inputs, fake, capsys):
    avatar = fake(FakeSession())
    options = ["--seed", "5", "--size", "128x96", "--steps", "2", "--prompt", "a person"]
    code, out, err = run([*JOB, *options], capsys)
    assert (code, err) == (0, [])
    assert "wrote talk.mp4: 33 frames, 1.32 s, 128x96 at 25 fps (40.0 frames/s, first frame after 0.50 s)" in out
    asked = dict(avatar.asked)
    assert asked.pop("image").shape == (80, 100, 3)
    assert asked == {"prompt": "a person", "seed": 5, "steps": 2, "size": (96, 128)}
    assert avatar.session.closed
    clip = read_video("talk.mp4", 48_000)
    bright = clip.frames.mean(axis=(1, 2, 3)) > 120
    assert clip.frames.shape == (33, 96, 128, 3) and np.flatnonzero(bright).tolist() == list(range(20, 25))
    assert clip.audio is not None and abs(len(clip.audio) - 1.3 * 48_000) < 100
    loud = np.flatnonzero(np.abs(clip.audio) > 0.3) / 48_000
    assert loud[0] == pytest.approx(0.8, abs=0.005) and loud[-1] == pytest.approx(1.0, abs=0.005)


def test_options_reach_load(inputs, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(
        runtime, "load", lambda name, **options: asked.update(name=name, **options) or FakeAvatar(FakeSession())
    )
    options = ["--model", "liveavatar-14b", "--checkpoint", "files", "--device", "cpu", "--placement", "single"]
    options += ["--precision", "fp8"]
    assert run([*JOB, *options], capsys)[0] == 0
    told = {"checkpoint": Path("files"), "device": "cpu", "placement": "single", "precision": "fp8"}
    assert asked == {"name": "liveavatar-14b"} | told


@pytest.fixture(autouse=True)
def hears_ctrl_c():
    """Jobs that a shell starts in the background inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_finishes_the_file(inputs, fake, capsys):
    fake(FakeSession(stop_at=BLOCK))
    code, out, err = run(JOB, capsys)
    assert (code, err) == (130, [])
    assert "stopped: wrote talk.mp4: 12 frames, 0.48 s" in out
    clip = read_video("talk.mp4")
    assert len(clip.frames) == 12 and clip.audio is not None and len(clip.audio) == pytest.approx(0.48 * RATE, abs=20)


def test_ctrl_c_while_a_block_is_made_lets_it_finish(inputs, fake, capsys):
    class Interrupted(FakeSession):
        def _frames(self, total: int) -> np.ndarray:
            if total and not self.made:
                signal.raise_signal(signal.SIGINT)
            return super()._frames(total)

    fake(Interrupted())
    code, out, told = run(JOB, capsys)
    assert code == 130 and told == [] and f"stopped: wrote talk.mp4: {BLOCK} frames" in out
    clip = read_video("talk.mp4")
    assert len(clip.frames) == BLOCK and abs(len(clip.audio) - BLOCK / FPS * RATE) < 40
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_stops_at_once(inputs, fake, capsys):
    class Stuck(FakeSession):
        def _frames(self, total: int) -> np.ndarray:
            if self.made:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("the second Ctrl-C was not heard")
            return super()._frames(total)

    fake(Stuck())
    code, out, told = run(JOB, capsys)
    assert code == 130 and told == [] and f"stopped: wrote talk.mp4: {BLOCK} frames" in out


def test_ctrl_c_before_the_first_frame_leaves_nothing(inputs, fake, capsys):
    fake(FakeSession(stop_at=0))
    assert run(JOB, capsys)[:2] == (130, "stopped: nothing was written\n")
    assert not Path("talk.mp4").exists()
    Path("talk.mp4").write_text("precious")
    fake(FakeSession(stop_at=0))
    assert run([*JOB, "-y"], capsys)[:2] == (130, "stopped: nothing was written\n")
    assert Path("talk.mp4").read_text() == "precious"


def test_ctrl_c_while_loading_leaves_nothing(inputs, monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "load", interrupted)
    assert run(JOB, capsys)[:2] == (130, "stopped: nothing was written\n")


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_one_line_unless_asked(inputs, fake, capsys, debug):
    fake(FakeSession(stop_at=BLOCK, error=RuntimeError("shapes\ndiffer")))
    code, _, err = run([*JOB, *(["--debug"] if debug else [])], capsys)
    told = "kinora: internal error: RuntimeError: shapes differ; run again with --debug for the traceback"
    assert code == 1 and err[-1] == told
    assert (len(err) > 1) == debug and any("Traceback" in line for line in err) == debug
    assert len(read_video("talk.mp4").frames) == 12  # what was made before the bug stays


def test_an_existing_file_is_kept_unless_told(inputs, fake, capsys):
    fake(FakeSession())
    Path("talk.mp4").write_text("precious")
    code, _, err = run(JOB, capsys)
    assert code == 2 and len(err) == 1 and "talk.mp4 exists; pass --overwrite" in err[0]
    assert Path("talk.mp4").read_text() == "precious"
    assert run([*JOB, "-y"], capsys)[0] == 0
    assert len(read_video("talk.mp4").frames) == 33


@pytest.mark.parametrize("option", ["--audio", "--image"])
def test_an_input_is_never_overwritten(inputs, fake, capsys, option):
    """Not even under another name."""
    fake(FakeSession())
    given = Path(JOB[JOB.index(option) + 1]).rename("given.mp4")
    before = given.read_bytes()
    Path("talk.mp4").symlink_to(given)
    code, _, err = run([*JOB, option, str(given), "-y"], capsys)
    assert code == 2 and len(err) == 1 and "talk.mp4 is an input as well" in err[0]
    assert given.read_bytes() == before


def test_an_output_that_cannot_be_written_is_told_before_loading(inputs, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    code, _, err = run([*JOB[:-1], "voice.wav/talk.mp4"], capsys)
    assert code == 2 and len(err) == 1 and "voice.wav is no folder" in err[0]


def test_silence_is_refused_until_allowed(inputs, fake, capsys):
    fake(FakeSession())
    write_sound(Path("quiet.wav"), np.full(RATE, 0.0005, np.float32), "pcm_f32le", RATE)
    job = ["generate", "-i", "face.png", "-a", "quiet.wav", "-o", "talk.mp4"]
    code, _, err = run(job, capsys)
    assert code == 2 and len(err) == 1 and "quiet.wav is silent" in err[0] and "--allow-silence" in err[0]
    assert run([*job, "--allow-silence"], capsys)[0] == 0


BAD_INPUT = {
    "no picture": ({"--image": "missing.png"}, "no such picture: missing.png"),
    "no sound file": ({"--audio": "missing.wav"}, "no such sound file: missing.wav"),
    "a sound as picture": ({"--image": "voice.wav"}, "voice.wav is not a picture"),
    "a picture as sound": ({"--audio": "face.png"}, "face.png has no sound"),
    "another ending": ({"-o": "talk.avi"}, "end the name with .mp4"),
    "a folder as output": ({"-o": "."}, "is a folder"),
    "words as size": ({"--size": "large"}, "'large' is no size; write WIDTHxHEIGHT"),
    "words as seed": ({"--seed": "abc"}, "Invalid value for '--seed'"),
    "unknown option": ({"--speed": "1"}, "No such option: --speed"),
    "unknown model": ({"--model": "avatar-9000"}, "avatar-9000"),
    "no checkpoint": ({"--model": "liveavatar-14b"}, "checkpoint"),
    "an empty checkpoint": ({"--model": "liveavatar-14b", "--checkpoint": "."}, "lacks"),
    "unknown placement": ({"--placement": "moon"}, "moon"),
    "unknown precision": ({"--precision": "int3"}, "int3"),
    "unknown device": ({"--device": "abacus"}, "abacus"),
}


@pytest.mark.parametrize("changes, told", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_clear_line(inputs, capsys, changes, told):
    options = dict(zip(JOB[1::2], JOB[2::2], strict=True)) | changes
    code, out, err = run(["generate", *(word for pair in options.items() for word in pair)], capsys)
    assert code == 2 and out == ""
    assert len(err) == 1 and err[0].startswith("kinora: ") and told in err[0]
    assert not Path("talk.mp4").exists()


@pytest.mark.parametrize("size", ["100x96", "100000", "0"])
def test_sizes_that_a_model_cannot_do(inputs, capsys, size):
    write_model(inputs / "small")
    code, _, err = run([*JOB, "--model", "small", "--size", size], capsys)
    assert code == 2 and len(err) == 1 and "multiples of" in err[0]


def test_wrong_weights_are_one_line(inputs, capsys):
    write_model(inputs / "small")
    save_file({"dit.odd": np.zeros(3, np.float32)}, "small/tiny.safetensors")
    code, _, err = run([*JOB, "--model", "small"], capsys)
    assert code == 2 and len(err) == 1 and "tiny.safetensors" in err[0]
    Path("small/tiny.safetensors").write_bytes(b"cut off")
    code, _, err = run([*JOB, "--model", "small"], capsys)
    assert code == 2 and len(err) == 1 and "tiny.safetensors" in err[0]


def test_generate_with_a_real_model(inputs, capsys):
    """The whole way, nothing faked: a randomly initialised model of tiny's architecture."""
    write_model(inputs / "small")
    code, out, err = run([*JOB, "--model", "small"], capsys)
    assert (code, err) == (0, [])
    assert "33 frames" in out
    clip = read_video("talk.mp4")
    assert len(clip.frames) == 33 and clip.audio is not None and abs(len(clip.audio) - 1.3 * RATE) < 40
    first = Path("talk.mp4").read_bytes()
    assert run([*JOB, "--model", "small", "-y"], capsys)[0] == 0
    assert Path("talk.mp4").read_bytes() == first  # the same seed gives the same file


INTERRUPTED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
from kinora import runtime
from kinora.runtime.cli import main
sys.path.insert(0, sys.argv[1])
from cli_doubles import FakeAvatar, FakeSession
import time

class Slow(FakeSession):
    def feed(self, samples):
        time.sleep(0.04)
        return super().feed(samples)

runtime.load = lambda *_, **options: FakeAvatar(Slow())
print("ready", file=sys.stderr, flush=True)
sys.exit(main(sys.argv[2:]))
"""


def test_a_real_ctrl_c_in_a_real_process(inputs):
    """Two minutes of sound; the signal comes once the file grows; the process ends with 130 and the file is whole."""
    voice = np.random.default_rng(0).uniform(-0.5, 0.5, 120 * RATE).astype(np.float32)
    write_sound(Path("voice.wav"), voice, "pcm_s16le", RATE)
    command = [sys.executable, "-c", INTERRUPTED, str(Path(__file__).parent), *JOB]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    guard = threading.Timer(60, process.kill)
    guard.start()
    while process.poll() is None and not (Path("talk.mp4").exists() and Path("talk.mp4").stat().st_size > 5_000):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate()
    guard.cancel()
    assert process.returncode == 130, err
    written = re.search(r"stopped: wrote talk\.mp4: (\d+) frames", out)
    assert written and err.rpartition("ready\n")[2] == ""  # what comes before, libraries said while they were imported
    clip = read_video("talk.mp4")
    assert len(clip.frames) == int(written[1]) >= 25
    assert clip.audio is not None and len(clip.audio) / RATE == pytest.approx(len(clip.frames) / FPS, abs=0.5)
