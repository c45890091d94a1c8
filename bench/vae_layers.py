"""The convolutions of a steady step of the fused VAE: what they are called, and their FLOPs and bytes."""

from collections import Counter
from typing import Any
from unittest import mock

from torch import Tensor

from ..graphs.rewrite import wan_vae_stages
from ..graphs.rewrite.wan_vae import StreamingDecoder, StreamingEncoder
from ..kernels import padded_conv3d

Key = tuple[int, int, tuple[int, int, int], bool]
Call = tuple[Any, ...]
"""Arguments of `padded_conv3d`: x, weight, bias, gamma, residual, raw, normed, time stride, split, SiLU."""


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
