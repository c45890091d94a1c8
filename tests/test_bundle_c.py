"""Bundles from C: the header under every compiler, the examples under sanitizers, numbers equal to PyTorch's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_bundles import FILES_AT, HEADER_FOLDER, IDX, SANITIZE, STRICT, write_sample
from kinora.checkpoints_tools.bundle.format import sealed
from kinora.checkpoints_tools.bundle.write import write_bundle
from kinora.graphs.models.layers import Linear
from kinora.graphs.quantize import Fp8Linear
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "c"
C_COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)] or [n for n in ("cc",) if shutil.which(n)]
CPP_COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
needs_compiler = pytest.mark.skipif(not C_COMPILERS, reason="there is no C compiler: install gcc or clang")
INCLUDE = ("-I", str(HEADER_FOLDER))


def compile_c(source: Path, target: Path, *options: str, compiler: str = "") -> Path:
    """A warning is an error, of the compiler and of this test."""
    command = [compiler or C_COMPILERS[0], *STRICT, *options, *INCLUDE, str(source), "-o", str(target)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert not ran.returncode and not ran.stderr, ran.stderr
    return target


@needs_compiler
@pytest.mark.parametrize("mode", [(), ("-DKINORA_BUNDLE_READ",)], ids=["mapped", "read"])
def test_the_header_is_clean_c99_and_cpp(tmp_path: Path, mode: tuple[str, ...]) -> None:
    source = tmp_path / "one.c"
    source.write_text('#define KINORA_BUNDLE_IMPLEMENTATION\n#include "kinora_bundle.h"\n')
    strict = (*STRICT[1:], "-Wshadow", "-Wconversion", *mode, "-c", *INCLUDE, str(source))
    for compiler in C_COMPILERS:
        subprocess.run([compiler, "-std=c99", *strict, "-o", str(tmp_path / "c.o")], check=True)
    for compiler in CPP_COMPILERS:
        subprocess.run([compiler, "-x", "c++", "-std=c++11", *strict, "-o", str(tmp_path / "cpp.o")], check=True)


@needs_compiler
def test_the_header_can_be_included_by_many_files(tmp_path: Path) -> None:
    """One file holds the code, another only the declarations, and both come into one program."""
    (tmp_path / "a.c").write_text('#define KINORA_BUNDLE_IMPLEMENTATION\n#include "kinora_bundle.h"\n')
    (tmp_path / "b.c").write_text(
        '#include "kinora_bundle.h"\n#include "kinora_bundle.h"\n'
        'int main(void) { kinora_error e; return kinora_bundle_open("nowhere", &e) ? 1 : !e.message[0]; }\n'
    )
    sources = (str(tmp_path / "a.c"), str(tmp_path / "b.c"))
    subprocess.run([C_COMPILERS[0], *STRICT, *INCLUDE, *sources, "-o", str(tmp_path / "both")], check=True)
    assert subprocess.run([str(tmp_path / "both")]).returncode == 0


@needs_compiler
def test_small_numbers_in_c_are_those_of_pytorch(tmp_path: Path) -> None:
    """Every bf16, float16 and e4m3 number."""
    source = tmp_path / "numbers.c"
    source.write_text(
        '#define KINORA_BUNDLE_IMPLEMENTATION\n#include "kinora_bundle.h"\n#include <stdio.h>\n'
        "int main(void) {\n    uint32_t i;\n    float x[3];\n    for (i = 0; i < 65536; i++) {\n"
        "        x[0] = kinora_from_bf16((uint16_t)i);\n        x[1] = kinora_from_f16((uint16_t)i);\n"
        "        x[2] = kinora_from_f8_e4m3((uint8_t)(i & 255));\n        fwrite(x, sizeof x[0], 3, stdout);\n    }\n"
        "    return 0;\n}\n"
    )
    made = subprocess.run([str(compile_c(source, tmp_path / "numbers", *SANITIZE))], check=True, capture_output=True)
    ours = torch.from_numpy(np.frombuffer(made.stdout, "<f4").copy()).view(-1, 3)
    bits = torch.arange(65536, dtype=torch.int32)
    half = bits.to(torch.uint16)
    wanted = (
        half.view(torch.bfloat16).float(),
        half.view(torch.float16).float(),
        (bits % 256).to(torch.uint8).view(torch.float8_e4m3fn).float(),
    )
    for column, want in zip(ours.unbind(1), wanted, strict=True):
        assert torch.equal(torch.nan_to_num(column, nan=7e7), torch.nan_to_num(want, nan=7e7))


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(EXAMPLES / "linear.c", tmp_path_factory.mktemp("linear") / "linear", *SANITIZE)


def run_linear(program: Path, bundle: Path, layer: str, x: Tensor, width: int, folder: Path) -> Tensor:
    """x [rows, K] through the C program -> [rows, N]."""
    x.numpy().astype("<f4").tofile(folder / "rows.f32")
    files = [str(folder / "rows.f32"), str(folder / "result.f32")]
    ran = subprocess.run([str(program), str(bundle), layer, *files], capture_output=True, text=True)
    assert not ran.returncode and not ran.stderr, ran.stderr
    return torch.from_numpy(np.fromfile(files[1], "<f4")).view(-1, width)


@needs_compiler
@pytest.mark.parametrize("kind", ["float32", "bf16", "fp8 by row", "fp8 whole"])
def test_a_linear_layer_is_that_of_pytorch(kind: str, linear: Path, tmp_path: Path) -> None:
    layer: nn.Module = Linear(80, 48).requires_grad_(False)
    x = 3 * torch.randn(5, 80)
    x[1], x[2, 0] = 0, 1e-9  # a silent row; numbers far apart
    if kind != "float32":
        layer, x = layer.bfloat16(), x.bfloat16().float()
    if kind.startswith("fp8"):
        assert isinstance(layer, nn.Linear)
        layer = Fp8Linear(layer, "row")
    if kind == "fp8 whole":  # one scale for the weight, one a row for the input: what "row" does with such a weight
        layer.weight, layer.weight_descale = _one_scale(layer)
    write_bundle(tmp_path / "b", {"dit": {f"one.{k}": v for k, v in layer.state_dict().items()}}, {"model": "layer"})
    ours = run_linear(linear, tmp_path / "b", "dit.one", x, 48, tmp_path)
    theirs = layer(x if kind == "float32" else x.bfloat16()).float()
    # in half precision a sum in another order may round to the neighbour
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "float32" else {"rtol": 2**-7, "atol": 1e-4}
    torch.testing.assert_close(ours, theirs, **tolerance)
    if kind != "float32":
        assert (ours == theirs).float().mean() > 0.98


def _one_scale(layer: nn.Module) -> tuple[Tensor, Tensor]:
    wide = layer.weight.float() * layer.weight_descale
    descale = wide.abs().amax().reshape(1) / 448
    return (wide / descale).to(torch.float8_e4m3fn), descale


@needs_compiler
@pytest.mark.parametrize("layer", ["dit.none", "dit.other", "dit.whole"])
def test_what_is_no_layer_is_an_error_and_no_crash(layer: str, linear: Path, tmp_path: Path) -> None:
    tensors = {
        "other.weight": torch.randn(4, 4, 4),
        "other.bias": torch.randn(4),
        "whole.weight": torch.ones(4, 4, dtype=torch.int32),
        "whole.bias": torch.randn(4),
    }
    write_bundle(tmp_path / "b", {"dit": tensors}, {"model": "layer"})
    ran = subprocess.run([str(linear), str(tmp_path / "b"), layer, "a", "b"], capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.startswith("linear: ") and "Sanitizer" not in ran.stderr


def can_link(*options: str) -> bool:
    """Whether the compiler and its libraries are here for a target."""
    if not C_COMPILERS:
        return False
    command = [C_COMPILERS[0], *options, "-x", "c", "-", "-o", os.devnull]
    return not subprocess.run(command, input="int main(void) { return 0; }", capture_output=True, text=True).returncode


@needs_compiler
@pytest.mark.parametrize("build", ["smaller limit", "32 bits"])
@pytest.mark.parametrize("mode", [(), ("-DKINORA_BUNDLE_READ",)], ids=["mapped", "read"])
def test_a_file_beyond_the_address_space_is_refused(build: str, mode: tuple[str, ...], tmp_path: Path) -> None:
    """Never a part of it: 4 GiB and some bytes, whose lower 32 bits are a small file."""
    target = ("-m32",) if build == "32 bits" else ("-DKINORA_LARGEST_FILE=1000000",)
    if build == "32 bits" and not can_link("-m32"):
        pytest.skip("this compiler has no 32-bit libraries")
    program = compile_c(Path(__file__).with_name("fuzz_bundle.c"), tmp_path / "use", *mode, *target)
    sample = write_sample(tmp_path / "b")

    def use() -> str:
        return subprocess.run([str(program), str(sample.folder)], capture_output=True, text=True, check=True).stdout

    assert use().startswith("0 ")
    size, index = (1 << 32) + 8192, bytearray(sample.index)
    index[FILES_AT + 16 : FILES_AT + 24] = size.to_bytes(8, "little")  # of dit.safetensors
    (sample.folder / IDX).write_bytes(sealed(bytes(index)))
    os.truncate(sample.folder / "dit.safetensors", size)  # grown; it takes no disk
    limit = 2**31 - 1 if build == "32 bits" else 1_000_000
    told = f"dit.safetensors has {size} bytes; this program can address files of up to {limit}"
    assert use() == f"5 {told}\n"
    if not mode and build != "32 bits":  # a plain build maps it, and finds that it holds more than its tensors
        plain = compile_c(Path(__file__).with_name("fuzz_bundle.c"), tmp_path / "plain")
        ran = subprocess.run([str(plain), str(sample.folder)], capture_output=True, text=True, check=True)
        assert ran.stdout == "4 dit.safetensors has bytes behind its last tensor\n"


@needs_compiler
def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    """Every command of examples/c/README.md, as it is written there."""
    text = (EXAMPLES / "README.md").read_text()
    commands = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["kinora", "cc", "./walk", "cc", "python", "./linear"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = f"{sys.executable} -c 'import sys; from kinora.runtime.cli import main; sys.exit(main())'"
    for command in commands:
        spoken = re.sub("^kinora", lambda _: program, command)
        spoken = re.sub("^python", sys.executable, spoken)
        ran = subprocess.run(spoken, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert not ran.returncode and not ran.stderr, (command, ran.stderr)
    assert np.isfinite(np.fromfile(tmp_path / "result.f32", "<f4")).all()
    assert (tmp_path / "result.f32").stat().st_size == 4 * 768 * 4
