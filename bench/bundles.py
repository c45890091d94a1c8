"""How long a bundle takes to load: LiveAvatar 14B in FP8 with random weights, from a warm page cache to a ready model.

    python -m kinora.bench.bundles --folder /tmp/bundle --out bundles.json

Writes the bundle (17 GB; `--layers` for less), reads its files once so that they are cached, then loads it in a fresh
process, several times: the first load also makes the pinned buffers. `--model tiny --device cpu` tries it anywhere.
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints_tools.bundle.device import read_to_device
from ..checkpoints_tools.bundle.read import Bundle
from ..checkpoints_tools.bundle.write import tensor_bytes, write_bundle
from ..graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar
from ..graphs.models.wan_vae import BF16_AUTOCAST, WAN21_VAE, WanVae
from ..graphs.quantize import quantize_linears
from ..runtime.compile import PUBLISHED
from ..runtime.systems.bundle import load_bundle
from ..runtime.systems.bundle_parts import parts_of
from ..runtime.systems.front_ends import FixedPrompt
from ..runtime.systems.liveavatar import LiveAvatarSystem
from ..runtime.systems.liveavatar_mode import STREAM
from .loading import memory_of_process
from .models import drawn, inference

READ_AT_ONCE = 1 << 26
ALONE_BYTES = 1 << 31
LOADS = 3
GOAL_SECONDS = 5.0


def random_system(layers: int, device: torch.device) -> LiveAvatarSystem:
    """LiveAvatar 14B cut to `layers`, its VAE and wav2vec 2.0 with random weights in bfloat16; one prompt, no UMT5."""
    from ..runtime.encoders.wav2vec import WAV2VEC2_LARGE_XLSR, Wav2Vec2Encoder
    from ..runtime.systems.encoder_front_ends import Wav2Vec2Speech

    injected = tuple(layer for layer in LIVEAVATAR_14B.audio_inject_layers if layer < layers)
    config = replace(LIVEAVATAR_14B, num_layers=layers, audio_inject_layers=injected)
    with drawn(torch.bfloat16, device):
        dit = inference(LiveAvatar(config))
        speech = Wav2Vec2Encoder(WAV2VEC2_LARGE_XLSR)
        rows = torch.randn(config.text_len, config.text_dim)
    with drawn(torch.float32, device):
        vae = inference(WanVae(WAN21_VAE, BF16_AUTOCAST))
    return LiveAvatarSystem(dit, vae, STREAM, FixedPrompt(rows), Wav2Vec2Speech(speech))


def write(folder: Path, model: str, layers: int, device: torch.device) -> dict[str, Any]:
    """Make the FP8 bundle; seconds and bytes."""
    if model == PUBLISHED:
        system = random_system(layers, device)
    else:
        from ..runtime import load

        system = load(model, precision="bfloat16", device=str(device)).system
    quantize_linears(system.dit, granularity="row")
    parts = parts_of(system)
    _synchronize(device)
    started = time.perf_counter()
    write_bundle(folder, parts.tensors, {"model": model, **parts.manifest}, overwrite=True)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "bytes": size,
        "seconds": round(seconds, 2),
        "gb_per_second": round(size / seconds / 1e9, 2),
        "alone_gb_per_second": alone(folder, parts.tensors["dit"]),
    }


def alone(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """GB/s of each thing that writing does, on one thread, with the first tensors of a part: copying them from their
    device, SHA-256, CRC-32, and writing until they are on the disk. The slowest is the limit of a file."""
    chosen, size = [], 0
    for tensor in tensors.values():
        if size < ALONE_BYTES:
            chosen.append(tensor)
            size += tensor.nbytes
    cpu, digest, path = torch.device("cpu"), hashlib.sha256(), folder / "alone.tmp"
    took, copied = _timed(lambda: list(map(tensor_bytes, chosen)), cpu)
    found = {"copy": took}
    found["sha256"] = _timed(lambda: list(map(digest.update, copied)), cpu)[0]
    found["crc32"] = _timed(lambda: list(map(zlib.crc32, copied)), cpu)[0]

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for data in copied:
                file.write(data)
            os.fsync(file.fileno())

    found["disk"] = _timed(write, cpu)[0]
    path.unlink()
    return {what: round(size / seconds / 1e9, 2) for what, seconds in found.items()}


def warm(folder: Path) -> float:
    """Read every byte once, with several threads -> GB/s."""
    started, size = time.perf_counter(), 0

    def read(path: Path) -> int:
        buffer, total = bytearray(READ_AT_ONCE), 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
        return total

    with ThreadPoolExecutor(4) as pool:
        size = sum(pool.map(read, [path for path in folder.iterdir() if path.is_file()]))
    return size / (time.perf_counter() - started) / 1e9


def measure(folder: Path, device: torch.device) -> dict[str, Any]:
    """Load the bundle LOADS times; the last model is used once and compared with the files.

    The growth of the host's peak counts mapped pages of files too.
    """
    _synchronize(device)  # starts CUDA, which a program does once
    before = memory_of_process()["VmHWM"]
    seconds: list[float] = []
    system: LiveAvatarSystem | None = None
    for _ in range(LOADS):
        system = None
        gc.collect()
        took, system = _timed(partial(load_bundle, folder, "auto", device), device)
        seconds.append(took)
    assert system is not None
    size = sum(file.size for file in Bundle.open(folder).index.files)
    host = memory_of_process()["VmHWM"] - before
    used, finite = _timed(partial(_use, system), device)
    return {
        "bytes": size,
        "seconds": [round(s, 3) for s in seconds],
        "gb_per_second": [round(size / s / 1e9, 2) for s in seconds],
        "goal_seconds": GOAL_SECONDS,
        "host_growth_bytes": host,
        "device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "equal_to_the_files": _equal(folder, system, device),
        "first_use_seconds": round(used, 3),
        "finite": finite,
    }


def _timed(act: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    started = time.perf_counter()
    result = act()
    _synchronize(device)
    return time.perf_counter() - started, result


@torch.inference_mode()
def _use(system: LiveAvatarSystem) -> bool:
    """The prompt and a noise level through quantised and other layers: finite?"""
    dit = system.dit
    text = dit.embed_text(system.encode_prompt("").to(dit.device, dit.dtype))
    state = dit.embed_time(torch.full((1, 1), 500.0, device=dit.device))
    return all(bool(t.isfinite().all()) for t in (text.layers[-1].k, text.layers[-1].v, state.e0))


def _equal(folder: Path, system: LiveAvatarSystem, device: torch.device) -> bool:
    """The transformer's tensors on the device are those of the mapped file, copied by PyTorch."""
    held, wanted = system.dit.state_dict(), Bundle.open(folder).mapped("dit")
    return all(
        torch.equal(held[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8).to(device))
        for key, value in wanted.items()
    )


def parts_alone(folder: Path, device: torch.device) -> dict[str, float]:
    """Seconds of the copies alone, a part at a time: what is left of a load is building modules."""
    bundle, seconds = Bundle.open(folder), {}
    for part in bundle.parts:
        seconds[part] = round(_timed(partial(read_to_device, bundle, part, device), device)[0], 3)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.bundles", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/kinora-bench-bundle"), help="where it is made")
    parser.add_argument("--model", default=PUBLISHED)
    parser.add_argument("--layers", type=int, default=LIVEAVATAR_14B.num_layers, help="of the 14B model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--load", action="store_true", help="only load what is in --folder")
    parser.add_argument("--keep", action="store_true", help="leave the bundle there")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bundles: no GPU is visible; try --model tiny --device cpu", file=sys.stderr)
        return 2
    if args.load:
        found = measure(args.folder, device)
        print(json.dumps(found | {"parts_seconds": parts_alone(args.folder, device)}))
        return 0
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m kinora.bench.bundles " + " ".join(argv if argv is not None else sys.argv[1:]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "model": args.model,
        "layers": args.layers if args.model == PUBLISHED else None,
    }
    try:
        report["write"] = write(args.folder, args.model, args.layers, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report["warm_gb_per_second"] = round(warm(args.folder), 2)
        again = ["--load", "--folder", str(args.folder), "--device", args.device]
        ran = subprocess.run([sys.executable, "-m", "kinora.bench.bundles", *again], stdout=subprocess.PIPE, text=True)
        if ran.returncode:
            print("bundles: loading failed, see above", file=sys.stderr)
            return 1
        report["load"] = json.loads(ran.stdout.splitlines()[-1])
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
