"""`python -m kinora.bench.exported`: AOTInductor packages on this machine's GPU, run from C++.

Exports `tiny`, and two layers of LiveAvatar 14B with the whole video VAE (random weights, 704 x 384, bfloat16), with
the Triton ops inside; builds `examples/cpp` with CMake, or with the compiler alone where CMake finds no CUDA toolkit;
runs the program on each folder. Prints what it made of each: kernels in the package, relative errors against PyTorch,
and the program's own report with its times. `--device cpu` tries the script itself on `tiny`.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graphs.host_compiler import sharing_compiler
from ..graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar
from ..graphs.models.wan_vae import BF16, WAN21_VAE, WanVae
from ..graphs.quantize import quantize_linears
from ..runtime.export import export, prepare, tolerance
from ..runtime.faces import draw_portrait
from ..runtime.load import load
from ..runtime.systems.liveavatar import LiveAvatarSystem
from ..runtime.systems.liveavatar_mode import STREAM

SOURCE = Path(__file__).resolve().parents[1] / "examples" / "cpp"
LOADED = re.compile(r"(\w+) = loadKernel\(")


@dataclass(frozen=True)
class Case:
    """A system to export, at (height, width) in pixels."""

    system: LiveAvatarSystem
    size: tuple[int, int]


class RandomFeatures:
    """Stands for a speech encoder: random features of as many frames as the sound has."""

    def __init__(self, layers: int, channels: int, samples_per_frame: int):
        self.layers, self.channels, self.samples_per_frame = layers, channels, samples_per_frame

    def push(self, samples: Tensor) -> Tensor:
        return torch.randn(self.layers, self.channels, len(samples) // self.samples_per_frame)

    def finish(self) -> Tensor:
        return torch.zeros(self.layers, self.channels, 0)


def tiny(device: torch.device, precision: str) -> Case:
    system = load("tiny", precision=precision, placement="single", device=str(device)).system
    assert system.size is not None
    return Case(system, system.size)


def two_layers(device: torch.device, fp8: bool = False) -> Case:
    """The first two layers of LiveAvatar 14B, with audio after the first, and the published VAE; random weights.

    `fp8`: linear layers in e4m3, as `load(precision="fp8")` makes them.
    """
    config = replace(LIVEAVATAR_14B, num_layers=2, audio_inject_layers=(0,))
    torch.manual_seed(0)
    with device:
        dit = LiveAvatar(config).to(torch.bfloat16).eval().requires_grad_(False)
        vae = WanVae(WAN21_VAE, BF16).eval().requires_grad_(False)
        prompt = torch.randn(24, config.text_dim, dtype=torch.bfloat16)
    if fp8:
        quantize_linears(dit, granularity="row")
    mode = replace(STREAM, motion_frames=25)
    system = LiveAvatarSystem(
        dit,
        vae,
        mode,
        encode_prompt=lambda _: prompt,
        audio_features=lambda mode: RandomFeatures(config.audio_layers, config.audio_dim, mode.samples_per_frame),
    )
    return Case(system, (704, 384))


def build(device: torch.device, folder: Path) -> Path:
    """Build examples/cpp; the path of its program."""
    torch_folder = Path(torch.__file__).parent
    program, compiler = folder / "kinora_stream", sharing_compiler()
    if shutil.which("cmake"):
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), prefix]
        configure.append(f"-DCMAKE_CXX_COMPILER={shutil.which(compiler) or compiler}")
        made = [subprocess.run(configure, capture_output=True, text=True, check=False)]
        if made[0].returncode == 0:
            made.append(subprocess.run(["cmake", "--build", str(folder)], capture_output=True, text=True, check=False))
        if made[-1].returncode == 0:
            print("built with CMake")
            return program
        print("CMake failed, the compiler alone will do:", (made[-1].stderr or made[-1].stdout)[-1500:])
    libraries = ["torch", "torch_cpu", "c10"] + ["torch_cuda", "c10_cuda"] * (device.type == "cuda")
    include = torch_folder / "include"
    command: list[Any] = [compiler, "-std=c++20", "-O2", SOURCE / "stream.cpp", "-o", program]
    command += ["-isystem", include, "-isystem", include / "torch/csrc/api/include"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", f"-L{torch_folder / 'lib'}"]
    command += [f"-Wl,-rpath,{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined"]
    subprocess.run([*command, *(f"-l{name}" for name in libraries)], check=True)
    print("built with the compiler alone")
    return program


def kernels(package: Path) -> tuple[int, int]:
    """Triton kernels that a package loads: those of `kernels/`, and inductor's own, which it calls triton_*."""
    archive = zipfile.ZipFile(package)
    sources = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp")]
    names = {name for source in sources for name in LOADED.findall(source)}
    own = {name for name in names if name.startswith("triton_")}
    return len(names - own), len(own)


def run_case(name: str, make: Callable[[], Case], device: torch.device, program: Path, blocks: int) -> dict[str, Any]:
    """Export one case, run the C++ program on it, and tell."""
    print(f"\n=== {name}", flush=True)
    case = make()
    samples = np.random.default_rng(0).standard_normal(4 * 16_000).astype(np.float32) * 0.1
    picture = np.asarray(draw_portrait(0))
    stream = prepare(case.system, picture, samples, case.size, blocks=blocks)
    limit = tolerance(case.system)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        errors = export(case.system, stream, Path(folder), tell=lambda text: print(text, flush=True))
        seconds = time.perf_counter() - started
        counts = {part: kernels(Path(folder) / f"{part}.pt2") for part in errors}
        print(f"exported in {seconds:.0f} s; relative errors from Python {errors}")
        print(f"Triton kernels (ours, inductor's own) {counts}")
        command = [str(program), folder, device.type, str(limit)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    print(ran.stdout, ran.stderr, f"exit code {ran.returncode}", flush=True)
    return {
        "case": name,
        "export_seconds": seconds,
        "python_errors": errors,
        "kernels": counts,
        "exit_code": ran.returncode,
        "report": ran.stdout.splitlines(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--blocks", type=int, default=4, help="blocks of each stream; the first one warms up")
    parser.add_argument("--only", help="one case by its name: tiny float32, tiny bfloat16, two layers of 14B, ...")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu tries this script without one", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}", flush=True)
    cases: dict[str, Callable[[], Case]] = {"tiny float32": lambda: tiny(device, "float32")}
    if device.type == "cuda":
        cases["tiny bfloat16"] = lambda: tiny(device, "bfloat16")
        cases["two layers of 14B"] = lambda: two_layers(device)
        cases["two layers of 14B, fp8"] = lambda: two_layers(device, fp8=True)
    chosen = {name: make for name, make in cases.items() if arguments.only in (None, name)}
    if not chosen:
        print(f"there is no case {arguments.only!r}; choose one of {', '.join(cases)}", file=sys.stderr)
        return 2
    found, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        program = build(device, Path(folder))
        for name, make in chosen.items():
            try:
                found.append(run_case(name, make, device, program, arguments.blocks))
                if found[-1]["exit_code"]:
                    failures.append(name)
            except Exception:
                traceback.print_exc()
                failures.append(name)
    if arguments.output:
        words = shlex.join(["python", "-m", "kinora.bench.exported", *sys.argv[1:]])
        about = {"date": time.strftime("%Y-%m-%d"), "command": words, "device": card, "torch": torch.__version__}
        arguments.output.write_text(json.dumps(about | {"cases": found}, indent=1) + "\n")
    print(f"{len(failures)} of {len(chosen)} cases failed{': ' if failures else ''}{', '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
