"""What this machine has and what would run on it: the facts behind `kinora info`."""

import inspect
import math
import os
import platform
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import torch
from safetensors import SafetensorError, safe_open

from ..checkpoints_tools.locate import NotFound, locate
from ..graphs.quantize import FP8_CAPABILITY
from ..kernels import ops
from ..kernels.dispatch import triton_runs
from .errors import CheckpointError
from .load import MODELS, TINY_FOLDER, pick_device
from .systems.liveavatar_checkpoint import BASE, BASE_REPOSITORY, find_files

GIB = 2**30
PACKAGES = ("torch", "triton", "torchao", "transformers", "av", "numpy")
LIVEAVATAR_DOWNLOAD_GB = 47  # transformer 32.6, text encoder 11.4, LoRA 1.4, speech encoder and VAE
# A captured session at 704x384 and the text encoder (docs/performance.md, Memory).
LIVEAVATAR_FP8_GB = 62  # 50.3 + 11.4
LIVEAVATAR_BF16_GB = 103  # 91.5 + 11.4


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; `fp8`: whether it multiplies e4m3; `driver` is None where nvidia-ml-py is not installed."""

    name: str
    memory_gib: float
    fp8: bool
    driver: str | None


@dataclass(frozen=True)
class Op:
    """A fused operation and what computes it on this machine."""

    name: str
    backend: str


@dataclass(frozen=True)
class Model:
    """A model that `load` knows: where its files are (None: not found) and whether it would run here."""

    name: str
    about: str
    size: str
    folder: Path | None
    would_run: str


@dataclass(frozen=True)
class Info:
    """Everything that `kinora info` prints."""

    system: str
    python: str
    cores: int
    memory_gib: float | None
    packages: dict[str, str]
    ffmpeg: str
    gpus: tuple[Gpu, ...]
    device: str
    ops: tuple[Op, ...]
    models: tuple[Model, ...]


def collect(checkpoint: Path | None = None) -> Info:
    """Look at the machine. `checkpoint`: where the files of LiveAvatar might lie, beside the usual places."""
    device, gpus = pick_device("auto"), list_gpus()
    return Info(
        system=platform.platform(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=_memory_gib(),
        packages={name: _version(name) for name in PACKAGES},
        ffmpeg=str(av.ffmpeg_version_info),
        gpus=gpus,
        device=str(device),
        ops=list_ops(device),
        models=(_tiny(device), _liveavatar(checkpoint, gpus)),
    )


def list_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices that PyTorch sees."""
    if not torch.cuda.is_available():
        return ()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    driver = _driver()
    return tuple(
        Gpu(found.name, found.total_memory / GIB, (found.major, found.minor) >= FP8_CAPABILITY, driver)
        for found in devices
    )


def list_ops(device: torch.device) -> tuple[Op, ...]:
    """The semantic ops: the files of `kernels/` that hold a `reference`. Those that ask the dispatch have kernels."""
    homes = {inspect.getmodule(getattr(ops, name)) for name in ops.__all__}
    named = sorted((home.__name__.rsplit(".", 1)[1], home) for home in homes if home and hasattr(home, "reference"))
    triton = triton_runs(torch.empty(0, device=device))
    plain = "PyTorch" if device.type == "cpu" else "PyTorch or cuDNN"
    return tuple(
        Op(name, f"{'Triton' if triton and hasattr(home, 'triton_runs') else plain}, {device.type}")
        for name, home in named
    )


def parameter_count(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone. Raises CheckpointError when it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); reinstall kinora") from error


def find_checkpoint(checkpoint: Path | None) -> Path | None:
    """The folder that `load` would take `checkpoint` for without a download. None: it is looked for here, in
    ./checkpoints and in the Hub's cache."""
    usual = [Path(BASE), Path("checkpoints", BASE)]
    name = checkpoint or next((place for place in usual if place.is_dir()), BASE_REPOSITORY)
    try:
        found = locate(name, download=False)
    except NotFound:
        return None
    return found if found.is_dir() else None


def _tiny(device: torch.device) -> Model:
    files = sorted(TINY_FOLDER.glob("*.safetensors"))
    if not files:
        return Model("tiny", MODELS["tiny"], "", None, f"no: {TINY_FOLDER} holds no weights; reinstall kinora")
    numbers = sum(map(parameter_count, files))
    size = f"{numbers / 1e6:.1f} M parameters, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
    return Model("tiny", MODELS["tiny"], size, TINY_FOLDER, f"yes, on {device} in float32")


def _liveavatar(checkpoint: Path | None, gpus: tuple[Gpu, ...]) -> Model:
    name, about = "liveavatar-14b", MODELS["liveavatar-14b"]
    size = f"16.3 B parameters, {LIVEAVATAR_DOWNLOAD_GB} GB to download"
    found = find_checkpoint(checkpoint)
    if found is None:
        where = str(checkpoint) if checkpoint else f"./{BASE}, ./checkpoints/{BASE} or the Hugging Face cache"
        return Model(name, about, size, None, f"no: no files in {where}; see kinora info --help")
    missing = find_files(found).missing
    if missing:
        return Model(name, about, size, found, f"no: {found} lacks {', '.join(missing)}")
    return Model(name, about, size, found, _liveavatar_on(gpus))


def _liveavatar_on(gpus: tuple[Gpu, ...]) -> str:
    """Whether a complete LiveAvatar would run on one of the GPUs, and in which precision."""
    largest = max((gpu.memory_gib * GIB / 1e9 for gpu in gpus), default=0.0)
    largest_fp8 = max((gpu.memory_gib * GIB / 1e9 for gpu in gpus if gpu.fp8), default=0.0)
    fits = {"bfloat16": largest >= LIVEAVATAR_BF16_GB, "FP8 (precision fp8)": largest_fp8 >= LIVEAVATAR_FP8_GB}
    if any(fits.values()):
        return f"yes, on one GPU in {' or '.join(precision for precision, fit in fits.items() if fit)}"
    has = f"the largest here has {largest:.0f} GB" if gpus else "this machine has none"
    wanted = f"{LIVEAVATAR_FP8_GB} GB for FP8 (H100, H200 or later) or {LIVEAVATAR_BF16_GB} GB for bfloat16"
    return f"no: it takes a GPU with {wanted}; {has}"


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):  # not known on every system
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str | None:
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # the package or its library is absent, or the driver does not answer: it is told as unknown
        return None
