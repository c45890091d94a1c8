"""The C++ compiler that packages are built with: its code must share the C++ library of the process that loads it.

Some toolchains link libstdc++ into whatever they build. Beside the libstdc++ of libtorch such code has two sets of
locales in one process and crashes in the first regular expression, which every package runs as it is loaded. Where the
compiler is of that kind, a script around it hands the linker this process's own libstdc++ first.
"""

import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

PROBE = '#include <regex>\nbool probe(const char* s) { return std::regex_match(s, std::regex("[a-z]+")); }\n'
LIBRARY = "libstdc++.so"
SCRIPT = """#!/bin/sh
for word in "$@"; do
    case "$word" in -c | -E | -S | -M | c++-header | --version | -dump*) exec {compiler} "$@" ;; esac
done
exec {compiler} "$@" -x none {library}
"""


def sharing_compiler() -> str:
    """`$CXX` (or g++), or the path of a script that runs it so that it shares libstdc++.

    Errors: RuntimeError when there is no compiler, or it cannot build what shares the library.
    """
    return _sharing(os.environ.get("CXX", "g++"))


@cache
def _sharing(compiler: str) -> str:
    if shares(compiler):
        return compiler
    library = loaded_library()
    if library is None:
        raise RuntimeError(
            f"{compiler} links libstdc++ into what it builds, and this process has no {LIBRARY} to share"
        )
    script = Path(tempfile.mkdtemp(prefix="kinora-cxx-")) / "g++"
    script.write_text(SCRIPT.format(compiler=compiler, library=shlex.quote(library)))
    script.chmod(0o755)
    if not shares(str(script)):
        raise RuntimeError(
            f"{compiler} links libstdc++ into what it builds, which crashes beside libtorch; "
            "set CXX to a compiler with a shared libstdc++"
        )
    return str(script)


def shares(compiler: str) -> bool:
    """Whether a library built by `compiler` names libstdc++ as one that it needs."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(PROBE)
        command = [*shlex.split(compiler), "-shared", "-fPIC", str(source), "-o", str(built)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"there is no C++ compiler {compiler!r}; install g++, or set CXX to one") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"the C++ compiler {compiler!r} does not work:\n{error.stderr.strip()}") from error
        return LIBRARY.encode() in built.read_bytes()  # the name stands in its dynamic section


def loaded_library() -> str | None:
    """The path of the libstdc++ that this process runs on."""
    maps = Path("/proc/self/maps")
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()} if maps.exists() else set()
    return min((path for path in paths if LIBRARY in path), default=None)
