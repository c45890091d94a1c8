"""The compiler of packages: what it builds shares libstdc++ with the process, also where the toolchain links it in."""

import shutil
import subprocess
from ctypes import CDLL
from pathlib import Path

import pytest
from kinora.graphs.host_compiler import LIBRARY, loaded_library, shares, sharing_compiler

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
MATCH = '#include <regex>\nextern "C" int found(const char* s) { return std::regex_match(s, std::regex("[a-c]+")); }\n'


@pytest.fixture
def static_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that links the library in, in a folder whose name has a space."""
    script = tmp_path / "a folder" / "static-g++"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    script.chmod(0o755)
    try:
        if shares([str(script)]):
            pytest.skip("-static-libstdc++ does nothing here")
    except RuntimeError:
        pytest.skip("there is no static libstdc++")
    monkeypatch.setenv("CXX", str(script))
    return script


def build(compiler: str, source: str, folder: Path, *options: str) -> Path:
    (folder / "source.cpp").write_text(source)
    built = folder / "built"
    subprocess.run([compiler, *options, str(folder / "source.cpp"), "-o", str(built)], check=True)
    return built


def test_a_compiler_that_shares_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    if not shares(["g++"]):
        pytest.skip("g++ links libstdc++ in here")
    monkeypatch.setenv("CXX", "g++")
    assert sharing_compiler() == "g++"
    monkeypatch.delenv("CXX")
    assert sharing_compiler() == "g++"


def test_one_that_links_the_library_in_is_made_to_share(static_compiler: Path, tmp_path: Path) -> None:
    compiler = sharing_compiler()
    assert shares([compiler])
    assert LIBRARY in str(loaded_library())
    library = CDLL(str(build(compiler, MATCH, tmp_path, "-x", "c++", "-shared", "-fPIC")))
    assert (library.found(b"abc"), library.found(b"abd")) == (1, 0)


@pytest.mark.parametrize("options", [["-E"], ["-c"], ["-x", "c++-header"]], ids=str)
def test_steps_before_linking_are_left_alone(
    static_compiler: Path, tmp_path: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    if options[-1] == "c++-header":
        static_compiler.write_text(static_compiler.read_text().replace("-static-libstdc++ ", ""))  # it links headers
    compiler = sharing_compiler()
    capfd.readouterr()
    assert build(compiler, "int one() { return 1; }\n", tmp_path, *options).stat().st_size
    assert not capfd.readouterr().err


def test_several_words_become_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "g++ -DANSWER=42")
    compiler = sharing_compiler()
    assert Path(compiler).is_file()
    source = 'extern "C" int answer() { return ANSWER; }\n'
    assert CDLL(str(build(compiler, source, tmp_path, "-shared", "-fPIC"))).answer() == 42


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler", "no C\\+\\+ compiler 'no-such-compiler' \\(No such file"),
        ("/tmp", "no C\\+\\+ compiler '?/tmp'? \\(Permission denied"),
        ("g++ --no-such-option", "does not work:\n.*no-such-option"),
    ],
)
def test_what_is_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch, compiler: str, words: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(RuntimeError, match=words):
        sharing_compiler()


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install one, for example the package g\\+\\+"):
        sharing_compiler()
