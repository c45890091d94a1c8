"""The compiler of packages: what it builds shares libstdc++ with the process, also where the toolchain links it in."""

import shutil
import subprocess
from ctypes import CDLL
from pathlib import Path

import pytest
from kinora.graphs.host_compiler import LIBRARY, loaded_library, shares, sharing_compiler

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
MATCH = '#include <regex>\nextern "C" int found(const char* s) { return std::regex_match(s, std::regex("[a-c]+")); }\n'
STATIC = '#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n'


@pytest.fixture
def static_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "static-g++"
    script.write_text(STATIC)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


def test_a_compiler_that_shares_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    assert shares("g++")
    assert sharing_compiler() == "g++"


def test_one_that_links_the_library_in_is_made_to_share(static_compiler: Path, tmp_path: Path) -> None:
    assert not shares(str(static_compiler))
    compiler = sharing_compiler()
    assert shares(compiler)
    assert LIBRARY in str(loaded_library())
    source, built = tmp_path / "regex.cpp", tmp_path / "regex.so"
    source.write_text(
        '#include <regex>\nextern "C" int found(const char* s) { return std::regex_match(s, std::regex("[a-c]+")); }\n'
    )
    subprocess.run([compiler, "-x", "c++", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    library = CDLL(str(built))
    assert (library.found(b"abc"), library.found(b"abd")) == (1, 0)


@pytest.mark.parametrize("option", ["-E", "-c"])
def test_steps_before_linking_are_left_alone(static_compiler: Path, tmp_path: Path, option: str) -> None:
    source = tmp_path / "one.cpp"
    source.write_text("int one() { return 1; }\n")
    made = tmp_path / "made"
    ran = subprocess.run(
        [sharing_compiler(), option, str(source), "-o", str(made)], capture_output=True, text=True, check=True
    )
    assert made.stat().st_size
    assert not ran.stderr


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler 'no-such-compiler'; install"):
        sharing_compiler()


def test_one_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ --no-such-option")
    with pytest.raises(RuntimeError, match="does not work"):
        sharing_compiler()
