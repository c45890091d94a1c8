"""`python -m kinora.bench.loading`: how long LiveAvatar 14B takes from warm files to a ready model on a GPU.

Writes random shards of the exact published key set (33 GB of bfloat16 and the LoRA) and reads them once, so that the
page cache holds them. Then a fresh process a variant loads them with `load_liveavatar`: seconds, host memory (the
process's own pages, which the page cache is not), device memory. `stream`: reading alone, nothing done to the tensors,
by number of reader threads. `plain`: the whole bfloat16 model first, then `quantize_linears`, to compare with.
Needs only PyTorch and Triton.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints_tools.liveavatar import load_liveavatar
from ..checkpoints_tools.load import Fp8
from ..checkpoints_tools.lora import LORA_TARGETS, is_target
from ..checkpoints_tools.sources import open_weights
from ..checkpoints_tools.stream import BUFFERS, PIECE, READERS, stream_tensors
from ..graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar, LiveAvatarConfig
from ..graphs.quantize import quantize_linears

INDEX = "diffusion_pytorch_model.safetensors.index.json"
LORA = "liveavatar.safetensors"
SHARD_BYTES = 9.97e9  # of the published shards but the last
RANK = 128
WRITERS = 8
VARIANTS = ("fp8", "bf16", "plain", *(f"stream-{readers}" for readers in (1, 2, 4, 8, 16)))
GB = 1e9


def config_of(layers: int) -> LiveAvatarConfig:
    """The published sizes with the first `layers` blocks."""
    inject = tuple(layer for layer in LIVEAVATAR_14B.audio_inject_layers if layer < layers)
    return replace(LIVEAVATAR_14B, num_layers=layers, audio_inject_layers=inject)


def shapes_of(config: LiveAvatarConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in LiveAvatar(config).state_dict().items()}


def lora_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and is_target(module, LORA_TARGETS):
            found[f"{module}.lora_A.default.weight"] = (RANK, shape[1])
            found[f"{module}.lora_B.default.weight"] = (shape[0], RANK)
    return found


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], device: torch.device) -> int:
    """A safetensors file of random bfloat16, drawn on `device`, written by several threads; returns its bytes."""
    table, starts, end = {}, {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        starts[name] = end
        end += size
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        os.pwrite(handle, struct.pack("<Q", len(header)) + header, 0)
        os.ftruncate(handle, 8 + len(header) + end)

        def write(name: str) -> None:
            shape = shapes[name]
            values = torch.randn(shape, device=device, dtype=torch.bfloat16) * (shape[-1] ** -0.5)
            raw, at = memoryview(values.cpu().view(-1).view(torch.uint8).numpy().data), 0
            while at < len(raw):
                at += os.pwrite(handle, raw[at:], 8 + len(header) + starts[name] + at)

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, shapes))
    finally:
        os.close(handle)
    return 8 + len(header) + end


def write_checkpoint(folder: Path, layers: int, device: torch.device) -> int:
    """Shards, index and LoRA; returns the bytes of all files."""
    shapes = shapes_of(config_of(layers))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        held = sum(2 * torch.Size(s).numel() for s in shards[-1].values())
        if held and held + 2 * torch.Size(shape).numel() > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    total = 0
    index: dict[str, str] = {}
    for place, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{place:05d}-of-{len(shards):05d}.safetensors"
        total += write_shard(folder / file, shard, device)
        index |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return total + write_shard(folder / LORA, lora_shapes(shapes), device)


def warm(folder: Path) -> float:
    """Read every file once, with several threads; returns seconds."""
    started = time.perf_counter()
    pieces = [(f, at) for f in folder.glob("*.safetensors") for at in range(0, f.stat().st_size, 2**28)]

    def read(piece: tuple[Path, int]) -> None:
        with piece[0].open("rb", buffering=0) as file:
            file.seek(piece[1])
            file.readinto(bytearray(2**28))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(read, pieces))
    return time.perf_counter() - started


def memory_of_process() -> dict[str, int]:
    """Bytes of this process by kind: `VmHWM` the most in all, `RssAnon` its own, `RssFile` mapped files, ..."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0].startswith(("Rss", "VmHWM", "VmRSS"))}


@contextmanager
def peak_memory(every: float = 0.005) -> Iterator[dict[str, int]]:
    """Fills the dict with the growth of each kind of host memory to its peak inside the block."""
    before, done = memory_of_process(), threading.Event()
    peak: dict[str, int] = {}

    def watch() -> None:
        while not done.wait(every):
            for kind, value in memory_of_process().items():
                peak[kind] = max(peak.get(kind, 0), value - before[kind])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


@torch.no_grad()
def plain(folder: Path, config: LiveAvatarConfig, device: torch.device) -> LiveAvatar:
    """The whole model in bfloat16 first, then quantised: what `fp8` is compared with, in memory and bit by bit."""
    dit = load_liveavatar(folder / INDEX, folder / LORA, config, dtype=torch.bfloat16, device=device)
    quantize_linears(dit, granularity="row")
    return dit


def load_variant(folder: Path, layers: int, variant: str, device: torch.device) -> LiveAvatar | None:
    config = config_of(layers)
    if variant == "plain":
        return plain(folder, config, device)
    if variant in ("fp8", "bf16"):
        fp8 = Fp8() if variant == "fp8" else None
        return load_liveavatar(folder / INDEX, folder / LORA, config, dtype=torch.bfloat16, device=device, fp8=fp8)
    with open_weights(folder / INDEX) as weights:
        for _, value in stream_tensors(weights, weights.in_file_order(), device, int(variant.partition("-")[2])):
            last = value
        del last
    return None


def once_in_a_process(device: torch.device) -> dict[str, Callable[[], None]]:
    """What is in the first load of a process and in none after it, but is no part of loading."""

    def start() -> None:
        torch.zeros(1, device=device)

    def import_compiler() -> None:
        importlib.import_module("torch._dynamo")

    def multiply() -> None:
        values = torch.ones(64, 64, device=device)
        (values @ values).to(torch.bfloat16)

    return {"start of the device": start, "import of the compiler": import_compiler, "first matrix product": multiply}


def measure(folder: Path, layers: int, variant: str, device: torch.device) -> dict[str, Any]:
    """A load in this process and another after it: seconds of both, memory of the first.

    What a process does once, whatever it computes, comes before the clock and is timed by itself: CUDA starts,
    PyTorch's compiler is imported (modules without memory need it, as captured sessions do), a first matrix product
    loads its library.
    """
    gpu = device.type == "cuda"

    def timed(act: Callable[[], LiveAvatar | None]) -> tuple[float, LiveAvatar | None]:
        started = time.perf_counter()
        model = act()
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started, model

    def load() -> LiveAvatar | None:
        return load_variant(folder, layers, variant, device)

    once = {what: round(timed(act)[0], 3) for what, act in once_in_a_process(device).items()}
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with peak_memory() as peak:
        seconds, model = timed(load)
    found: dict[str, Any] = {"variant": variant, "once_seconds": once, "seconds": round(seconds, 3)}
    if gpu:
        found["device_peak_gb"] = round(torch.cuda.max_memory_allocated(device) / GB, 2)
        found["device_after_gb"] = round(torch.cuda.memory_allocated(device) / GB, 2)
        readers = int(variant.partition("-")[2] or READERS)
        found["pinned_gb"] = round(
            readers * BUFFERS * PIECE / GB, 3
        )  # whether the kinds below count it is the driver's
    found["host_growth_gb"] = {kind: round(value / GB, 3) for kind, value in sorted(peak.items())}
    if model is not None:
        found["model_gb"] = round(sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / GB, 2)
    del model
    again, _ = timed(load)
    found["seconds_again"] = round(again, 3)
    return found


def compare(folder: Path, layers: int, device: torch.device) -> dict[str, Any]:
    """Whether the model that was quantised on the way has the bits of the one that was quantised afterwards."""
    models = [load_variant(folder, layers, variant, device) for variant in ("fp8", "plain")]
    states: list[dict[str, Tensor]] = [model.state_dict() for model in models if model is not None]
    same = {k: torch.equal(v.view(torch.uint8), states[1][k].view(torch.uint8)) for k, v in states[0].items()}
    return {"tensors": len(same), "different": sorted(name for name, equal in same.items() if not equal)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.loading", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=40, help="of the transformer; fewer for less disk")
    parser.add_argument(
        "--folder", type=Path, help="where the shards are written and kept; a temporary one if left out"
    )
    parser.add_argument("--variant", default=",".join(VARIANTS), help="comma-separated, in this order")
    parser.add_argument("--check", action="store_true", help="also compare the bits of fp8 and plain")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--child", choices=(*VARIANTS, "compare"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("loading: no GPU is visible; --device cpu --layers 1 shows that it runs", file=sys.stderr)
        return 2
    if args.child:
        run = compare if args.child == "compare" else lambda *a: measure(a[0], a[1], args.child, a[2])
        print(json.dumps(run(args.folder, args.layers, device)))
        return 0
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kinora-loading-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(json.dumps(_measure_all(args, folder, device), indent=1))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    return 0


def _measure_all(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    started, written = time.perf_counter(), None
    if not (folder / INDEX).is_file():
        written = write_checkpoint(folder, args.layers, device)
    writing = time.perf_counter() - started
    print(f"wrote {(written or 0) / GB:.1f} GB in {writing:.1f} s; reading them", file=sys.stderr, flush=True)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m kinora.bench.loading " + " ".join(sys.argv[1:]),
        "what": "LiveAvatar 14B with LoRA, random shards of the published key set, from the page cache to the device",
        "machine": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "layers": args.layers,
        "files_gb": round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / GB, 2),
        "largest_shard_gb": round(max(f.stat().st_size for f in folder.glob("*.safetensors")) / GB, 2),
        "warm_read_seconds": round(warm(folder), 2),
        "results": [],
    }
    for variant in [*args.variant.split(","), *(["compare"] if args.check else [])]:
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--child", variant]
        command += ["--folder", str(folder), "--layers", str(args.layers), "--device", args.device]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(child.stdout.splitlines()[-1])
        print(f"{variant}: {json.dumps(result)}", file=sys.stderr, flush=True)
        if variant == "compare":
            report["fp8_on_the_way_equals_afterwards"] = result
        else:
            report["results"].append(result)
        _save(report, args.out)
    return report


def _save(report: dict[str, Any], path: Path | None) -> None:
    """After every variant, so that a run that is cut off keeps those that it had."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
