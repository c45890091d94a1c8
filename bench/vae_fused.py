"""The fused VAE on a GPU: is it right, where is the time, which tiles are best, and what does a step cost.

    python -m kinora.bench.vae_fused [--rows 88 --columns 48 --latents 3] [--out FILE.json] [--no-sweep] [--compiled]

Prints: FLOPs and bytes of every layer of a steady step; errors of each kernel and of whole streams against float32;
milliseconds of the plain VAE, of the fused one and of its CUDA graph; the tile sweep with the table `MEASURED` for
`kernels/conv3d_triton.py`; the same steps again on that table; the time by kernel. Random weights at published size.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..graphs.models.wan_vae import BF16, WAN21_VAE, DecoderState, EncoderState, WanVae
from ..graphs.rewrite import wan_vae_stages
from ..graphs.rewrite.wan_vae import StreamingDecoder, StreamingEncoder
from ..kernels import channel_norm, conv3d_triton, gather_taps, padded_conv3d
from ..kernels.conv3d_triton import Tile
from ..kernels.dispatch import using
from .harness.check import relative_l2
from .harness.timing import Timer
from .ops import check_case

Key = tuple[int, int, tuple[int, int, int], bool]
Call = tuple[Any, ...]
"""Arguments of `padded_conv3d`: x, weight, bias, gamma, residual, raw, normed, time stride, split, SiLU."""
Job = tuple[Key, tuple[bool, ...], int, int, Tile]
"""Layer, which of gamma, residual, raw and normed it has, time stride, split; and the tile to compile."""
SHARED_MEMORY = 227 * 1024
DOMINANT = {(96, 96), (192, 192), (384, 384), (192, 96), (384, 192)}


def milliseconds(run: Callable[[], Any], queue_ahead: bool = False) -> float:
    """Median time of a call; `queue_ahead` without its launch overhead."""
    return 1e3 * Timer(torch.device("cuda"), run_seconds=0.005, most=20, queue_ahead=queue_ahead)([run]).seconds


def make_vae(device: torch.device) -> WanVae:
    torch.manual_seed(0)
    vae = WanVae(WAN21_VAE)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return vae.to(device).eval().requires_grad_(False)


# The layers of a step


def record(stream: StreamingDecoder | StreamingEncoder, given: Tensor) -> list[Call]:
    """Every convolution of a steady step with the memory that it works on."""
    calls: list[Call] = []
    run = padded_conv3d.padded_conv3d

    def recording(*arguments: Any) -> None:
        calls.append(arguments)
        run(*arguments)

    with mock.patch.object(wan_vae_stages, "padded_conv3d", recording):
        stream.first = False
        stream.step(given)
    stream.reset()
    return calls


def key_of(call: Call) -> Key:
    weight = call[1]
    kt, kh, kw = weight.shape[2:5]
    return weight.shape[5], weight.shape[1], (kt, kh, kw), weight.shape[0] == 4


def signature(call: Call) -> tuple[Any, ...]:
    """Calls that cost the same have the same one."""
    return key_of(call), tuple(call[0].shape), tuple(view is not None for view in call[3:7])


def work(call: Call) -> tuple[float, float]:
    """FLOPs, and the fewest bytes through memory."""
    x, weight, _, _, residual, raw, normed, stride, _, _ = call
    phases, channels_out, kt, kh, kw, channels_in = weight.shape
    frames = (x.shape[1] - kt) // stride + 1
    pixels = x.shape[0] * frames * (x.shape[2] - 2) * (x.shape[3] - 2)
    flops = 2.0 * pixels * phases * channels_out * kt * kh * kw * channels_in
    views = (x, weight, residual, raw, normed)
    return flops, float(sum(view.numel() * view.element_size() for view in views if view is not None))


def print_work(name: str, calls: list[Call]) -> None:
    print(f"\n{name}: convolutions of a steady step (phase-folded FLOPs)")
    print(f"{'layer':36} {'x':>24} {'count':>5} {'TFLOP':>7} {'GB':>6}")
    counts = Counter(signature(call) for call in calls)
    seen: set[Any] = set()
    for call in calls:
        if signature(call) in seen:
            continue
        seen.add(signature(call))
        count, (flops, moved) = counts[signature(call)], work(call)
        shape = "x".join(map(str, call[0].shape[1:]))
        print(f"{name_of(call):36} {shape:>24} {count:5} {count * flops / 1e12:7.3f} {count * moved / 1e9:6.2f}")
    flops, moved = (sum(values) for values in zip(*map(work, calls), strict=True))
    print(f"{'all':61} {len(calls):5} {flops / 1e12:7.3f} {moved / 1e9:6.2f}", flush=True)


def name_of(call: Call) -> str:
    channels_in, channels_out, kernel, upsample = key_of(call)
    parts = zip(("residual", "raw", "normed"), call[4:7], strict=True)
    written = "+".join(word for word, view in parts if view is not None)
    return f"{channels_in}->{channels_out} {'x'.join(map(str, kernel))}{' up' if upsample else ''} {written}"


# Errors


def check_kernels(device: torch.device) -> bool:
    """Every op on its cases against its reference in float32; prints, says whether all hold."""
    print("\nkernels against float32 (relative L2)")
    good = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for op in (padded_conv3d.OP, channel_norm.OP, gather_taps.OP):
        for case in op.cases():
            found = check_case(op, case, device)
            good &= found.passed
            print(f"  {op.name:15} {case.name:14} {found.error:.1e} {'' if found.passed else 'WRONG'}", flush=True)
            torch.cuda.empty_cache()
    return good


def check_streams(vae: WanVae, latents: Tensor, video: Tensor) -> dict[str, float]:
    """Two chunks through plain float32, plain bf16 and fused bf16; `vae` ends in bf16."""
    chunk = latents.shape[2]
    parts = (latents, latents.flip(2))
    clips = (video[:, :, : 4 * chunk - 3], video)
    state, encoder_state = DecoderState(), EncoderState()
    with using(False):
        frames = torch.cat([vae.decode_stream(part, state, clamp=False) for part in parts], 2)
        coded = torch.cat([vae.encode_stream(clip, encoder_state) for clip in clips], 2)
        vae.set_precision(BF16)
        state, encoder_state = DecoderState(), EncoderState()
        plain = torch.cat([vae.decode_stream(part, state, clamp=False) for part in parts], 2)
        plain_coded = torch.cat([vae.encode_stream(clip, encoder_state) for clip in clips], 2)
    del state, encoder_state
    torch.cuda.empty_cache()
    errors = {"decode, plain bf16": relative_l2(plain, frames), "encode, plain bf16": relative_l2(plain_coded, coded)}
    rows, columns = latents.shape[3:]
    decoder = StreamingDecoder(vae, rows, columns, chunk, bound=None)
    errors["decode, fused bf16"] = relative_l2(torch.cat([decoder.step(part).clone() for part in parts], 2), frames)
    decoder.capture()
    errors["decode, captured"] = relative_l2(torch.cat([decoder.step(part).clone() for part in parts], 2), frames)
    del decoder
    torch.cuda.empty_cache()
    encoder = StreamingEncoder(vae, 8 * rows, 8 * columns, chunk)
    errors["encode, fused bf16"] = relative_l2(torch.cat([encoder.step(clip).clone() for clip in clips], 2), coded)
    encoder.capture()
    errors["encode, captured"] = relative_l2(torch.cat([encoder.step(clip).clone() for clip in clips], 2), coded)
    print("\ntwo chunks against the plain float32 stream, all at random weights (relative L2)")
    for name, error in errors.items():
        print(f"  {name:20} {error:.2e}")
    return errors


# Steps


def time_steps(vae: WanVae, latents: Tensor, video: Tensor) -> dict[str, float]:
    """Milliseconds of steady fused steps, eager and captured, and their peak memory in GB."""
    found: dict[str, float] = {}
    for name, given in (("decode", latents), ("encode", video)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stream = make_stream(name, vae, latents, video)
        stream.first = False
        stream.step(given)
        found[f"{name}, fused eager"] = milliseconds(partial(stream.step, given))
        stream.capture()
        stream.first = False
        found[f"{name}, fused captured"] = milliseconds(partial(stream.step, given))
        found[f"{name}, GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        del stream
    for name, value in found.items():
        print(f"  {name:26} {value:8.2f}", flush=True)
    return found


def make_stream(name: str, vae: WanVae, latents: Tensor, video: Tensor) -> StreamingDecoder | StreamingEncoder:
    chunk, rows, columns = latents.shape[2:]
    if name == "decode":
        return StreamingDecoder(vae, rows, columns, chunk)
    return StreamingEncoder(vae, 8 * rows, 8 * columns, chunk)


def time_plain(vae: WanVae, latents: Tensor, video: Tensor, compiled: bool) -> dict[str, float]:
    """Milliseconds of steady steps of the plain bf16 VAE, eager or through torch.compile."""
    decode: Callable[..., Tensor] = vae.decode_stream
    encode: Callable[..., Tensor] = vae.encode_stream
    how = "plain compiled" if compiled else "plain eager"
    if compiled:
        decode, encode = torch.compile(decode, dynamic=False), torch.compile(encode, dynamic=False)
    found = {}
    with using(False), torch.no_grad():
        decoder, encoder = DecoderState(), EncoderState()
        decode(latents, decoder)
        encode(video[:, :, : video.shape[2] - 3], encoder)
        found[f"decode, {how}"] = milliseconds(lambda: decode(latents, decoder))
        found[f"encode, {how}"] = milliseconds(lambda: encode(video, encoder))
    for name, value in found.items():
        print(f"  {name:26} {value:8.2f}", flush=True)
    return found


def profile(vae: WanVae, latents: Tensor, video: Tensor) -> None:
    """The kernels of captured steps by their time."""
    for name, given in (("decode", latents), ("encode", video)):
        stream = make_stream(name, vae, latents, video)
        stream.capture()
        stream.first = False
        stream.step(given)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            stream.step(given)
            torch.cuda.synchronize()
        events = sorted(prof.key_averages(), key=lambda event: -event.self_device_time_total)
        print(f"\n{name}: kernels of one replayed step")
        for event in events[:14]:
            print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:4} x {event.key[:90]}")
        sys.stdout.flush()
        del stream
        torch.cuda.empty_cache()


# Tiles


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=88, help="of the latents")
    parser.add_argument("--columns", type=int, default=48, help="of the latents")
    parser.add_argument("--latents", type=int, default=3, help="latent frames a step")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    parser.add_argument("--no-sweep", action="store_true", help="keep the tiles of the table")
    parser.add_argument("--compiled", action="store_true", help="also the plain VAE through torch.compile")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile the candidates")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.vae_fused measures kernels: it needs a GPU")
        return 2
    device = torch.device("cuda")
    began = time.perf_counter()
    torch.set_grad_enabled(False)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    good = check_kernels(device)
    vae = make_vae(device)
    latents = torch.randn(1, 16, options.latents, options.rows, options.columns, device=device)
    video = torch.rand(1, 3, 4 * options.latents, 8 * options.rows, 8 * options.columns, device=device) * 2 - 1
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "errors": check_streams(vae, latents, video),
    }
    torch.backends.cudnn.benchmark = True  # the library at its best, as in a session
    print("\nmilliseconds of a steady step")
    result["plain"] = time_plain(vae, latents, video, compiled=False)
    result["by rule"] = time_steps(vae, latents, video)
    torch.cuda.empty_cache()
    decoder = StreamingDecoder(vae, options.rows, options.columns, options.latents)
    calls = record(decoder, latents)
    print_work("decoder", calls)
    encoder = StreamingEncoder(vae, 8 * options.rows, 8 * options.columns, options.latents)
    encoding = record(encoder, video)
    print_work("encoder", encoding)
    if not options.no_sweep:
        best = sweep([*calls, *encoding], options.workers)
        print("\nMEASURED = {")
        for key, choice in best.items():
            print(f"    {key}: {choice},")
        print("}\n\nmilliseconds of a steady step on these tiles", flush=True)
        conv3d_triton.MEASURED.update(best)
        del decoder, encoder, calls, encoding
        result["tiles"] = {str(key): repr(tile) for key, tile in best.items()}
        result["measured"] = time_steps(vae, latents, video)
    profile(vae, latents, video)
    if options.compiled:
        result["compiled"] = time_plain(vae, latents, video, compiled=True)
    result["good"], result["seconds"] = good, time.perf_counter() - began
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'all kernels hold' if good else 'SOME KERNELS ARE WRONG'}; {result['seconds']:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
