"""The fused VAE on a GPU: is it right, where is the time, which tiles are best, and what does a step cost.

    python -m kinora.bench.vae_fused [--rows 88 --columns 48 --latents 3] [--out FILE.json] [--no-sweep] [--compiled]

Prints: FLOPs and bytes of every layer of a steady step; errors of each kernel and of whole streams against float32;
milliseconds of the plain VAE, of the fused one and of its CUDA graph; the tile sweep with the table `MEASURED` for
`kernels/conv3d_triton.py`; the same steps again on that table; the time by kernel. Random weights at published size.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graphs.models.wan_vae import BF16, WAN21_VAE, DecoderState, EncoderState, WanVae
from ..graphs.rewrite.wan_vae import StreamingDecoder, StreamingEncoder
from ..kernels import channel_norm, conv3d_triton, gather_taps, padded_conv3d
from ..kernels.dispatch import using
from .harness.check import relative_l2
from .ops import check_case
from .vae_layers import print_work, record
from .vae_tiles import milliseconds, sweep


def make_vae(device: torch.device) -> WanVae:
    torch.manual_seed(0)
    vae = WanVae(WAN21_VAE)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return vae.to(device).eval().requires_grad_(False)


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
