"""Which tiles suit the VAE's convolutions: candidates compiled in many processes, then timed on a step's layers."""

import multiprocessing
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..kernels import conv3d_triton, padded_conv3d
from ..kernels.conv3d_triton import Tile
from .harness.timing import Timer
from .vae_layers import Call, Key, key_of, signature, work

Job = tuple[Key, tuple[bool, ...], int, int, Tile]
"""Layer, which of gamma, residual, raw and normed it has, time stride, split; and the tile to compile."""
SHARED_MEMORY = 227 * 1024
DOMINANT = {(96, 96), (192, 192), (384, 384), (192, 96), (384, 192)}


def milliseconds(run: Callable[[], Any], queue_ahead: bool = False) -> float:
    """Median time of a call; `queue_ahead` without its launch overhead."""
    return 1e3 * Timer(torch.device("cuda"), run_seconds=0.005, most=20, queue_ahead=queue_ahead)([run]).seconds


def candidates(key: Key) -> list[Tile]:
    """Tiles worth a measurement: those that fit into shared memory and registers, fewer for the small layers."""
    channels_in, channels_out, kernel, _ = key
    splits = {96: [(64, 32), (128, 0)], 192: [(128, 64), (256, 0)], 384: [(128, 0), (256, 0), (256, 128)]}
    whole = max(1 << (channels_out - 1).bit_length(), 16)
    widths = splits.get(channels_out, [(whole, 0)] if whole <= 64 else [(128, 0), (256, 0)])
    deep = [k for k in (128, 64, 32, 16) if channels_in % k == 0][:2]
    found = []
    for m in (64, 128, 256):
        for n, n2 in widths:
            for k in deep:
                for warps in (4, 8):
                    accumulators = m * (n + n2) // (32 * warps)  # registers a thread
                    if m < 16 * warps or not 16 <= accumulators <= 192:
                        continue
                    stage = 2 * k * (m + n + n2)
                    for stages in (3, 4, 6):
                        # the epilogue's exchange of a half-precision tile may follow the pipeline in memory
                        if stages * stage <= SHARED_MEMORY - 4096 and stages * stage >= 40_000:
                            found.append(Tile(m, n, n2, k, warps, stages))
    if (channels_in, channels_out) not in DOMINANT or kernel == (3, 1, 1):
        return [tile for tile in found if tile.m == 128 and tile.stages in (4, 6)][:8]
    return found


def _compile(job: Job) -> str:
    """Run one tile once on a picture of a few pixels, so that its code lies in Triton's cache; error or ''."""
    (channels_in, channels_out, kernel, upsample), given, stride, split, tile = job
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    x = padded_conv3d.ringed(1, (3 - 1) * stride + kernel[0], 8, 8, channels_in, like)
    weight = like.new_zeros(4 if upsample else 1, channels_out, *kernel, channels_in)
    size = 16 if upsample else 8
    channels = -(-channels_out // split // 16) * 16
    view = padded_conv3d.ringed(1, 3 * split, size, size, channels, like)[:, :, 1:-1, 1:-1, : channels_out // split]
    exact = view.float() if channels_out == 27 else view  # the head's partial sums stay float32
    gamma, residual, raw, normed = given
    bias = torch.zeros(channels_out, device="cuda")
    try:
        conv3d_triton.launch(
            tile,
            x,
            weight,
            bias,
            stride,
            split,
            view if residual else None,
            exact if raw else None,
            view if normed and tile.covers(channels_out) else None,
            bias if gamma and tile.covers(channels_out) else None,
            True,
        )
        torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, or a compiler's limit: not a candidate
        return f"{type(error).__name__}: {error}"[:90]
    return ""


@contextmanager
def tile_of(key: Key, tile: Tile | None) -> Iterator[None]:
    before = dict(conv3d_triton.MEASURED)
    conv3d_triton.MEASURED[key] = tile
    try:
        yield
    finally:
        conv3d_triton.MEASURED.clear()
        conv3d_triton.MEASURED.update(before)


def sweep(calls: list[Call], workers: int) -> dict[Key, Tile | None]:
    """Time all candidates on every layer; prints the best ones, returns the best of each key."""
    counts = Counter(signature(call) for call in calls)
    unique = {signature(call): call for call in calls}
    groups: dict[Key, list[Call]] = defaultdict(list)
    for call in unique.values():
        groups[key_of(call)].append(call)
    jobs: dict[Job, None] = {}
    for key, group in groups.items():
        for tile in candidates(key):
            for call in group:
                given = tuple(view is not None for view in call[3:7])
                jobs[(key, given, call[7], call[8], tile)] = None
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        errors = dict(zip(jobs, pool.map(_compile, jobs, chunksize=4), strict=True))
    print(f"\n{len(jobs)} kernels compiled in {time.perf_counter() - began:.0f} s", flush=True)
    broken = {(job[0], job[4]): error for job, error in errors.items() if error}
    best: dict[Key, Tile | None] = {}
    for key, group in groups.items():
        flops = sum(counts[signature(call)] * work(call)[0] for call in group)
        rows: list[tuple[float, Tile | None, list[float]]] = []
        tiles: list[Tile | None] = [None, *candidates(key)]
        for choice in tiles:
            if choice is not None and (key, choice) in broken:
                continue
            with tile_of(key, choice):
                times = [milliseconds(partial(padded_conv3d.padded_conv3d, *call), queue_ahead=True) for call in group]
            total = sum(counts[signature(call)] * ms for call, ms in zip(group, times, strict=True))
            rows.append((total, choice, times))
        rows.sort(key=lambda row: row[0])
        best[key] = rows[0][1]
        print(f"{key}: {flops / 1e12:.3f} TFLOP a step; {sum(k == key for k, _ in broken)} tiles do not compile")
        shown = rows[:6] + [row for row in rows[6:] if row[1] is None]
        for total, choice, times in shown:
            each = " ".join(f"{ms:.3f}" for ms in times)
            print(f"  {total:7.2f} ms {flops / total / 1e9:6.0f} TFLOP/s  {choice or 'library'}  [{each}]")
        for error in sorted({error for (k, _), error in broken.items() if k == key})[:2]:
            print(f"  {error}")
        sys.stdout.flush()
    return best
