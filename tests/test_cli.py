"""The program beside `generate`: faces, help, what is compiled, sizes, and words that are no command."""

import re
import subprocess
import sys

import numpy as np
import pytest
from cli_doubles import run
from kinora.runtime.cli import main
from kinora.runtime.cli.options import parse_size
from kinora.runtime.errors import InputError
from kinora.runtime.media import read_image


def test_missing_and_unknown_words_are_one_line(capsys):
    for arguments, told in [(["generate"], "--image"), (["fly"], "fly"), (["face"], "--output")]:
        code, _, err = run(arguments, capsys)
        assert code == 2 and len(err) == 1 and told in err[0]


def test_face_draws_a_person(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(["face", "--seed", "7", "-o", "new/a.png", "--size", "128"], capsys)
    assert code == 0 and "wrote new/a.png: face 7, 128x128" in out
    picture = read_image("new/a.png")
    assert picture.shape == (128, 128, 3) and picture.std() > 20
    assert run(["face", "--seed", "8", "-o", "b.png", "--size", "128"], capsys)[0] == 0
    assert not np.array_equal(read_image("b.png"), picture)
    for arguments, told in [
        (["-o", "new/a.png"], "exists"),
        (["-o", "c.xyz"], ".png"),
        (["-o", "c.png", "--size", "7"], "64 to 2048"),
        (["-o", "c.png", "--seed", "-1"], "seed"),
    ]:
        code, _, err = run(["face", *arguments], capsys)
        assert code == 2 and len(err) == 1 and told in err[0]


def test_help_and_version_teach(capsys):
    assert "talking video" in run([], capsys)[1]
    code, out, _ = run(["generate", "--help"], capsys)
    assert code == 0 and "kinora generate --image face.png --audio voice.wav" in out and "tiny is embedded" in out
    assert re.fullmatch(r"kinora \d+\.\d+\.\d+\S*\n", run(["--version"], capsys)[1])


def test_help_is_quick():
    code = "import sys; from kinora.runtime.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_sizes_are_width_by_height():
    assert parse_size("") is None
    assert parse_size("704x384") == parse_size("704*384") == (384, 704)
    assert parse_size("256") == (256, 256)
    for text in ("1x2x3", "-5", "axb", "x"):
        with pytest.raises(InputError):
            parse_size(text)


def test_compile_explains_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--explain", "tiny"]) == 0
    told = capsys.readouterr().out
    assert "quantise" in told and "blocks.5" in told and "1300 TFLOP/s FP8" in told
    assert main(["compile", "tiny", "--precision", "float32"]) == 0
    assert "concatenate" in capsys.readouterr().out
    assert main(["compile", "--explain", "tiny", "--part", "prefill"]) == 0
    told = capsys.readouterr().out
    assert "blocks.5" in told and "audio_injector" not in told


def test_joined_caches_hand_on_more_in_e4m3(capsys: pytest.CaptureFixture[str]) -> None:
    """The results of self and text attention of each of the six blocks."""
    emitted = []
    for caches in ("slots", "joined"):
        assert main(["compile", "tiny", "--caches", caches]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("emit"))
        emitted.append(int(line.split()[1]))
    assert emitted[1] == emitted[0] + 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody"], "there is no model 'nobody'"),
        (["tiny", "--precision", "int3"], "precision 'int3' is not known"),
        (["tiny", "--size", "100x100"], "multiples of 16"),
        (["tiny", "--part", "head"], "part 'head' is not known"),
        (["tiny", "--caches", "joined", "--precision", "bf16"], "joined caches are FP8"),
        (["tiny", "--caches", "none"], "caches 'none' is not known; choose one of slots, joined"),
        (["tiny", "--memory", "0"], "ceilings must be more than 0"),
    ],
)
def test_compile_says_what_is_wrong(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", *arguments]) == 2
    assert words in capsys.readouterr().err
