"""Attention and the query/key path at the real shapes of LiveAvatar 14B, on one GPU.

    python -m kinora.bench.attention                 # check, time, compare; under four minutes on an H200
    python -m kinora.bench.attention --only qk       # one part: qk, self, cross or training
    python -m kinora.bench.attention --no-sweep      # without trying tile sizes
    python -m kinora.bench.attention --json F.json   # keep every number

Each kernel is checked first (fresh random inputs, poisoned outputs and caches, relative L2 against float32); one that
fails is reported as FAIL and not timed. Times are medians: of replays of a CUDA graph for the query/key path, whose
kernels are shorter than a launch from Python, of single launches for the others. The last lines are one table, and the
entries for `kernels/attention_table.py`.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels import (
    attention_backward,
    attention_cudnn,
    attention_forward,
    attention_fp8,
    attention_hopper,
    attention_joined,
    attention_table,
)
from ..kernels.attention_forward import Tiles
from ..kernels.attention_fp8 import Values
from ..kernels.kv_cache import quantize_heads
from ..kernels.rope_attention import rope_attention
from . import attention_report as reporting
from .attention_report import NAN, Report, Row, rate
from .attention_stream import BF16, DEVICE, Shape, Stream, count, exact
from .harness.check import relative_l2
from .query_key import query_key_path, row_tiles
from .rowwise import copy_rate

PARTS = ("qk", "self", "cross", "training")


FORWARD = [
    Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 4),
    Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2),
]  # fmt: skip
FP8 = [
    Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 4), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 4),
    Tiles(64, 128, 4, 2), Tiles(64, 128, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 4),
]  # fmt: skip


def sweep(name: str, tiles: Sequence[Tiles], run: Callable[[Tiles], Any], flops: float, enabled: bool) -> Tiles | None:
    """Time every choice of tiles, print each, and return the fastest."""
    readings: dict[Tiles, float] = {}
    for choice in tiles if enabled else []:
        try:
            readings[choice] = reporting.microseconds(lambda choice=choice: run(choice))  # type: ignore[misc]
            print(f"  {name} {astuple(choice)}: {readings[choice]:.1f} us, {rate(flops, readings[choice])}", flush=True)
        except Exception as error:  # out of shared memory, or a compiler's refusal
            print(f"  {name} {astuple(choice)}: {type(error).__name__} {str(error)[:80]}", flush=True)
    return min(readings, key=lambda choice: readings[choice]) if readings else None


def self_attention(report: Report, x: Stream, sweeping: bool) -> None:
    s, want = x.shape, exact(*x.wide)
    keys, values = x.two_segments()

    def attempt(name: str, bound: float, call: Callable[..., Tensor], *arguments: Any) -> None:
        run = partial(call, *arguments)
        report.run(name, bound, lambda: relative_l2(run(), want), run, s.flops)

    def forward(tiles: Tiles | None, k: list[Tensor], v: list[Tensor], rope: Tensor | None = None) -> Tensor:
        lengths = [x.length, None][: len(k)] if len(k) > 1 else [None]
        return attention_forward.forward(x.q, k, v, [None, rope][: len(k)], lengths, None, tiles)[0]

    best = sweep("bf16", FORWARD, lambda tiles: forward(tiles, keys, values), s.flops, sweeping)
    attempt(f"triton bf16, 2 segments {best and astuple(best)}", 1e-2, forward, best, keys, values)
    attempt("triton bf16, joined cache", 1e-2, forward, best, [x.joined.k], [x.joined.v])
    attempt("triton bf16, condition rotated on load", 1e-2, forward, None, [keys[0], x.raw_k], values, x.rope)
    bounds: tuple[tuple[Values, float], ...] = (("mixed", 6e-2), ("fp8", 7e-2))
    for mode, bound in bounds:
        fp8 = partial(attention_fp8.attention_fp8, x.q8, x.segments[mode], x.qk_descale)
        best = sweep(mode, FP8, fp8, s.flops, sweeping) or attention_fp8.choose_tiles(s.head_dim, mode)
        attempt(f"triton {mode} {astuple(best)}", bound, fp8, best)
    if attention_hopper.available(x.q.device):
        attempt("gluon fp8", 7e-2, attention_fp8.attention_fp8, x.q8, x.segments["fp8"], x.qk_descale)
        pairs = (keys, values, [x.length, None])
        attempt("gluon bf16, 2 segments", 1e-2, lambda: attention_hopper.forward_half(x.q, *pairs)[0])
    for name, library in attention_table.LIBRARIES.items():
        if name in attention_table.available():
            run = partial(library, x.q, x.joined.k, x.joined.v)
            attempt(f"{name}, joined cache", 1e-2, lambda run=run: run()[0])
    by_cudnn(report, x, want)


def by_cudnn(report: Report, x: Stream, want: Tensor) -> None:
    """cuDNN's frontend, which reads the number of keys on the device: bfloat16, and e4m3 with one scale a tensor."""
    if not attention_joined.available(x.q.device):
        report.rows.append(Row("cudnn-frontend", note="not installed, or no Hopper GPU"))
        return
    length = count(x.joined.k.shape[1])
    half = partial(attention_cudnn.attend, x.q, x.joined.k, x.joined.v, length)
    report.run("cudnn-frontend bf16, joined cache", 1e-2, lambda: relative_l2(half()[0], want), half, x.shape.flops)
    tensors = (x.q, x.joined.k, x.joined.v)
    scale_q, scale_k, scale_v = (448 / t.float().abs().amax().reshape(1) for t in tensors)
    scales = attention_joined.joined_scales(scale_q, scale_k, scale_v, 4 * scale_v, x.shape.tokens)
    q8, k8, v8 = (
        quantize_heads(t, s.expand(x.shape.heads)) for t, s in zip(tensors, (scale_q, scale_k, scale_v), strict=True)
    )
    fp8 = partial(attention_joined.attention_joined_fp8, q8, k8, v8, length, scales)

    def error() -> float:
        out8, descale = fp8()
        return relative_l2(out8.float() * descale[..., None], want)

    report.run("cudnn-frontend fp8, joined cache", 8e-2, error, fp8, x.shape.flops)


def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attention_forward.forward(q, [k], [v], [None], [None], None)


def other_attention(report: Report, s: Shape) -> None:
    """Text and audio cross-attention, the first block of a stream, the batch of four time-steps."""
    for name, batch, queries, keys in (
        ("text", 1, s.tokens, 512),
        ("audio", 3, s.moving, 5),
        ("first block", 1, s.tokens, s.tokens + s.condition),
        ("four time-steps", 4, s.tokens, s.ring + s.condition),
    ):
        q, k, v = (torch.randn(batch, n, s.heads, s.head_dim, device=DEVICE, dtype=BF16) for n in (queries, keys, keys))
        flops = 4.0 * batch * queries * keys * s.dim
        work = flops if keys > 100 else -4.0 * batch * (queries + keys) * s.dim
        want = exact(q, k, v)
        fastest = ("", math.inf)
        for implementation in ("triton", *attention_table.LIBRARIES):
            if implementation not in attention_table.available():
                continue
            run = partial(attention_table.LIBRARIES.get(implementation, ours), q, k, v)
            report.run(f"{name}: {implementation}", 1e-2, partial(first_error, run, want), run, work)
            row = report.rows[-1]
            if row.microseconds < fastest[1]:
                fastest = (implementation, row.microseconds)
        entry = attention_table.shape_class(q, k, v.dtype)
        report.rows.append(Row(f"{name}: table entry", note=f'"{entry}": "{fastest[0]}"'))


def first_error(run: Callable[[], tuple[Tensor, Tensor]], want: Tensor) -> float:
    return relative_l2(run()[0], want)


def training(report: Report, dtype: torch.dtype, bound: float, queries: int, keys: tuple[int, int]) -> None:
    """Gradients against float32 autograd, and the time of the backward pass (2.5 times the forward's products)."""
    heads, d = 12, 128
    leaves = [
        torch.randn(1, n, heads, d, device=DEVICE, dtype=dtype, requires_grad=True) for n in (queries, *keys, *keys)
    ]
    mask = torch.rand(queries, sum(keys), device=DEVICE) > 0.3
    weights = torch.randn(1, queries, heads, d, device=DEVICE, dtype=dtype)

    def check(seen: Tensor | None) -> float:
        q, *rest = leaves
        found = torch.autograd.grad(rope_attention(q, rest[:2], rest[2:], mask=seen), leaves, weights)
        wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
        scores = torch.einsum("bqhd,bkhd->bhqk", wide[0], torch.cat(wide[1:3], 1)) * d**-0.5
        p = (scores if seen is None else scores.masked_fill(~seen, -math.inf)).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", p, torch.cat(wide[3:], 1))
        wanted = torch.autograd.grad(out, wide, weights.float())
        return max(relative_l2(a, b) for a, b in zip(found, wanted, strict=True))

    none = [None, None]
    q, k, v = leaves[0].detach(), [t.detach() for t in leaves[1:3]], [t.detach() for t in leaves[3:]]
    for name, seen in (("", None), (", masked", mask)):
        out, lse = attention_forward.forward(q, k, v, none, none, seen)
        run = partial(attention_backward.backward, weights, q, k, v, none, seen, out, lse)
        flops = 10.0 * queries * sum(keys) * heads * d
        report.run(f"backward {str(dtype).removeprefix('torch.')}{name}", bound, partial(check, seen), run, flops)


def graph_capture(report: Report, x: Stream) -> None:
    """One captured graph serves a growing ring: lengths are read on the device."""
    keys, values = x.two_segments()
    length = count(x.shape.ring)

    def run() -> Tensor:
        return attention_forward.forward(x.q, keys, values, [None, None], [length, None], None)[0]

    def check() -> float:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        worst = 0.0
        for rows in (x.shape.tokens, 2 * x.shape.tokens + 7, x.shape.ring):
            length.fill_(rows)
            out.fill_(NAN)
            graph.replay()
            first = x.shape.condition
            k, v = (torch.cat((t[:, :first], t[:, first : first + rows]), 1) for t in (x.joined.k, x.joined.v))
            worst = max(worst, relative_l2(out, exact(x.q, k, v)))
        return worst

    report.run("one graph, three ring lengths", 1e-2, check, None, 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may be given several times")
    parser.add_argument("--no-sweep", action="store_true", help="time only the chosen tiles")
    parser.add_argument("--json", type=Path, help="write every row here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU is visible; this benchmark measures CUDA kernels")
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    report = Report()
    shape = Shape()
    parts = options.only or PARTS
    with torch.inference_mode():
        if "qk" in parts:
            rate_of_copies = copy_rate()
            print(f"device copy: {rate_of_copies / 1e6:.2f} TB/s", flush=True)
            stream = Stream.draw(shape)
            query_key_path(report, stream, rate_of_copies)
            if not options.no_sweep:
                row_tiles(stream)
        if "self" in parts:
            stream = Stream.draw(shape)
            self_attention(report, stream, not options.no_sweep)
            graph_capture(report, stream)
            del stream
        if "cross" in parts:
            other_attention(report, shape)
    if "training" in parts:
        training(report, BF16, 2e-2, 4096, (4096, 512))
        training(report, torch.float32, 1e-4, 2048, (2048, 512))
    print(f"\n{'kernel':44s} {'rel. L2':>9s} {'median':>13s} {'rate':>14s}")
    print(report.table())
    if options.json:
        found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps(found | {"rows": [vars(row) for row in report.rows]}, indent=1))
    return int(any(row.note == "FAIL" for row in report.rows))


if __name__ == "__main__":
    raise SystemExit(main())
