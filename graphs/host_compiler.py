"""The C++ compiler that packages are built with: its code must share the C++ library of the process that loads it.

Some toolchains link libstdc++ into whatever they build. Beside the libstdc++ of libtorch such code has two sets of
locales in one process and crashes in the first regular expression, which every package runs as it is loaded. Where the
compiler is of that kind, a script around it hands the linker this process's own libstdc++ first.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

COMPILERS = ("g++", "c++", "clang++")
PROBE = '#include <regex>\nbool probe(const char* s) { return std::regex_match(s, std::regex("[a-z]+")); }\n'
LIBRARY = "libstdc++.so"
SHARED = (LIBRARY.encode(), b"libc++.")  # what stands in the dynamic section of a library that shares
SCRIPT = """#!/bin/sh
[ $# -gt 1 ] || exec {compiler} "$@"
for word in "$@"; do
    case "$word" in -c | -E | -S | -M | -MM | -fsyntax-only | c++-header) exec {compiler} "$@" ;; esac
done
exec {compiler} "$@" {more}
"""


def sharing_compiler() -> str:
    """The path or name of `$CXX`, or of the first of `COMPILERS` that is there, or the path of a script that runs it so
    that it shares libstdc++ and is one word.

    Errors: RuntimeError when there is no compiler, or it cannot build what shares the library.
    """
    chosen = os.environ.get("CXX") or next((name for name in COMPILERS if shutil.which(name)), None)
    if chosen is None:
        raise RuntimeError(
            f"there is no C++ compiler ({', '.join(COMPILERS)}); install one, for example the package g++"
        )
    return _sharing(chosen)


@cache
def _sharing(chosen: str) -> str:
    words = [chosen] if shutil.which(chosen) else shlex.split(chosen)
    if shares(words):
        return words[0] if len(words) == 1 else _script(words)
    library = loaded_library()
    if library is None:
        raise RuntimeError(f"{chosen} links libstdc++ into what it builds, and this process has none to share")
    script = _script(words, "-x", "none", library)
    if not shares([script]):
        raise RuntimeError(
            f"{chosen} links libstdc++ into what it builds, which crashes beside libtorch; "
            "set CXX to a compiler with a shared libstdc++"
        )
    return script


def shares(command: Sequence[str]) -> bool:
    """Whether a library built by `command` names its C++ library as one that it needs.

    Errors: RuntimeError when it builds nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(PROBE)
        try:
            run = [*command, "-shared", "-fPIC", str(source), "-o", str(built)]
            subprocess.run(run, check=True, capture_output=True, text=True)
        except OSError as error:
            reason = (
                f"there is no C++ compiler {shlex.join(command)!r} ({error.strerror}); install g++, or set CXX to one"
            )
            raise RuntimeError(reason) from None
        except subprocess.CalledProcessError as error:
            reason = f"the C++ compiler {shlex.join(command)!r} does not work:\n{error.stderr.strip()}"
            raise RuntimeError(reason) from error
        content = built.read_bytes()
        return any(name in content for name in SHARED)


def loaded_library() -> str | None:
    """The path of the libstdc++ that this process runs on."""
    maps = Path("/proc/self/maps")
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()} if maps.exists() else set()
    return min((path for path in paths if LIBRARY in path), default=None)


def _script(command: Sequence[str], *more: str) -> str:
    """A script that runs `command`, with `more` behind the arguments where it links; the same for the same, because
    inductor's caches know a compiler by its path."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    text = SCRIPT.format(compiler=shlex.join(command), more=shlex.join(more))
    script = Path(cache_dir(), "kinora", hashlib.sha256(text.encode()).hexdigest()[:16], "g++")
    script.parent.mkdir(parents=True, exist_ok=True)
    unfinished = script.with_name(f"g++.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.chmod(0o755)
    unfinished.replace(script)
    return str(script)
