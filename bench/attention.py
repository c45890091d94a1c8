"""Attention and the query/key path at the real shapes of LiveAvatar 14B, on one GPU.

    python -m kinora.bench.attention                 # check, time, compare; under four minutes on an H200
    python -m kinora.bench.attention --no-sweep      # without trying tile sizes
    python -m kinora.bench.attention --json F.json   # keep every number

Each kernel is checked first (fresh random inputs, poisoned outputs and caches, relative L2 against float32); one that
fails is reported as FAIL and not timed. Times are medians of CUDA events. The last lines are one table, and the entries
for `kernels/attention_table.py`.
"""

import argparse
import json
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from ..kernels import attention_backward, attention_forward, attention_fp8, attention_table, qk_rows
from ..kernels.attention_forward import Tiles
from ..kernels.attention_fp8 import Values
from ..kernels.kv_cache import qkv_norm_rope, qkv_norm_rope_fp8, rotate_rows_into
from ..kernels.qk_norm_rope import apply_rope, head_norm, qk_norm_rope
from ..kernels.qk_norm_rope import reference as qk_reference
from ..kernels.rope_attention import rope_attention
from .attention_stream import BF16, DEVICE, Shape, Stream, count, exact
from .harness.check import relative_l2

NAN = float("nan")


@dataclass
class Row:
    """A line of the table."""

    name: str
    error: float = NAN
    bound: float = NAN
    microseconds: float = NAN
    rate: str = ""
    note: str = ""


class Report:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def run(
        self, name: str, bound: float, check: Callable[[], float], time: Callable[[], Any] | None, work: float
    ) -> None:
        """Check, then time. `work`: FLOPs if above 1e10 a byte count otherwise given as negative bytes."""
        row = Row(name, bound=bound)
        self.rows.append(row)
        try:
            row.error = check()
            if not row.error <= bound:  # NaN fails
                row.note = "FAIL"
            elif time is not None:
                row.microseconds = microseconds(time)
                row.rate = rate(work, row.microseconds)
        except Exception as error:
            print(traceback.format_exc(limit=-4)[-1500:])
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
        print(line(row), flush=True)

    def table(self) -> str:
        return "\n".join(line(row) for row in self.rows)


def line(row: Row) -> str:
    error = "" if math.isnan(row.error) else f"{row.error:.2e}"
    time = "" if math.isnan(row.microseconds) else f"{row.microseconds:9.1f} us"
    return f"{row.name:44s} {error:>9s} {time:>13s} {row.rate:>14s}  {row.note}"


def rate(work: float, time: float) -> str:
    """`work`: FLOPs, or minus the bytes moved."""
    return f"{work / time / 1e6:7.1f} TFLOP/s" if work > 0 else f"{-work / time / 1e6:7.2f} TB/s"


def microseconds(run: Callable[[], Any]) -> float:
    return 1e3 * float(triton.testing.do_bench(run, warmup=30, rep=150, return_mode="median"))


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
            readings[choice] = microseconds(lambda choice=choice: run(choice))  # type: ignore[misc]
            print(f"  {name} {astuple(choice)}: {readings[choice]:.1f} us, {rate(flops, readings[choice])}", flush=True)
        except Exception as error:  # out of shared memory, or a compiler's refusal
            print(f"  {name} {astuple(choice)}: {type(error).__name__} {str(error)[:80]}", flush=True)
    return min(readings, key=lambda choice: readings[choice]) if readings else None


def query_key_path(report: Report, x: Stream) -> None:
    s, parts = x.shape, x.parts
    qkv, weights, rope, write = parts["qkv"], parts["weights"], parts["rope"], parts["write"]
    q, k, v = qkv.chunk(3, -1)
    scale_q, scale_k = parts["scales"]
    row = s.tokens * s.dim  # elements of q, of k, or of v
    arguments = (qkv, weights[0], weights[1], rope)

    def streaming() -> float:
        cache = torch.full((2, 1, s.ring, s.heads, s.head_dim), NAN, device=DEVICE, dtype=BF16)
        got = qkv_norm_rope(*arguments, cache[0], cache[1], write, s.heads)
        want = qk_reference(q.float(), k.float(), weights[0].float(), weights[1].float(), rope, s.heads)
        assert cache[:, :, s.tokens :].isnan().all(), "rows of other blocks were written"
        assert torch.equal(cache[1, :, : s.tokens].flatten(2), v), "values are copied exactly"
        return max(relative_l2(got, want[0]), relative_l2(cache[0, :, : s.tokens], want[1]))

    def plain() -> float:
        want = qk_reference(q.float(), k.float(), weights[0].float(), weights[1].float(), rope, s.heads)
        got = qk_norm_rope(q, k, weights[0], weights[1], rope, s.heads)
        return max(relative_l2(a, b) for a, b in zip(got, want, strict=True))

    def single() -> float:
        want = qk_reference(q.float(), k.float(), weights[0].float(), weights[1].float(), None, s.heads)[0]
        return relative_l2(head_norm(q, weights[0], s.heads), want)

    def fp8() -> float:
        cache = torch.full((1, s.tokens, s.heads, s.head_dim), 7.0, device=DEVICE).to(torch.float8_e4m3fn)
        slots = qk_rows.Slots(1, s.tokens, s.tokens)
        got = qkv_norm_rope_fp8(*arguments, cache, None, write, scale_q, scale_k, slots, s.heads)
        want = qk_reference(q.float(), k.float(), weights[0].float(), weights[1].float(), rope, s.heads)
        pairs = zip((got, cache), (scale_q, scale_k), want, strict=True)
        return max(relative_l2(y.float() / scale[:, None], w) for y, scale, w in pairs)

    ring, mixed = parts["rings"]["fp8"], parts["rings"]["mixed"]
    heads_v = v.unflatten(-1, (s.heads, s.head_dim))

    def values() -> float:
        ring.store_values(heads_v, write)
        back = ring.with_length(count(s.tokens)).dequantize(torch.ones(s.heads, device=DEVICE))[1]
        return relative_l2(back, heads_v)

    def rotated() -> float:
        out = torch.full_like(x.raw_k, NAN)
        rotate_rows_into(x.raw_k, x.rope, out)
        return relative_l2(out, apply_rope(x.raw_k, x.rope, torch.float32))

    def rotated_fp8() -> float:
        out = torch.full_like(x.raw_k, 7.0).to(torch.float8_e4m3fn)
        rotate_rows_into(x.raw_k, x.rope, out, scale_k)
        return relative_l2(out.float() / scale_k[:, None], apply_rope(x.raw_k, x.rope, torch.float32))

    def mixed_values() -> float:
        write_mixed()
        assert torch.equal(mixed.v[:, : s.tokens].flatten(2), v), "values are copied exactly"
        return fp8()

    moved, table = x.raw_k[:, : s.moving], x.rope[: s.moving]
    out, out8 = torch.empty_like(moved), torch.empty_like(moved, dtype=torch.float8_e4m3fn)
    ring_k, ring_v = x.joined.ring
    write_bf16 = partial(qkv_norm_rope, *arguments, ring_k, ring_v, write, s.heads)
    write_fp8 = partial(qkv_norm_rope_fp8, *arguments, ring.k8, None, write, scale_q, scale_k, ring.slots, s.heads)
    write_mixed = partial(
        qkv_norm_rope_fp8, *arguments, mixed.k8, mixed.v, write, scale_q, scale_k, ring.slots, s.heads
    )
    run = report.run
    chosen = qk_rows.NUM_WARPS
    for warps in (4, 8, 16):
        qk_rows.NUM_WARPS = warps
        run(f"qkv_norm_rope bf16, {warps} warps", 1e-2, streaming, write_bf16, -12.0 * row)
    qk_rows.NUM_WARPS = chosen
    run("qkv_norm_rope fp8 (q, k)", 4e-2, fp8, write_fp8, -6.0 * row)
    run("qkv_norm_rope mixed (q, k fp8, v bf16)", 4e-2, mixed_values, write_mixed, -10.0 * row)
    run("store_values_fp8", 4e-2, values, lambda: ring.store_values(heads_v, write), -3.0 * row)
    run("qk_norm_rope bf16", 1e-2, plain, lambda: qk_norm_rope(q, k, weights[0], weights[1], rope, s.heads), -8.0 * row)
    run("head_norm bf16 (text queries)", 1e-2, single, lambda: head_norm(q, weights[0], s.heads), -4.0 * row)
    everything = partial(rotate_rows_into, x.raw_k, x.rope, x.joined.condition[0])
    run("rotate_rows_into, all condition keys, bf16", 1e-2, rotated, everything, -4.0 * x.raw_k.numel())
    reference, reference8 = (partial(rotate_rows_into, moved, table, *to) for to in ((out,), (out8, scale_k)))
    run("rotate_rows_into, reference keys, bf16", 1e-2, rotated, reference, -4.0 * moved.numel())
    run("rotate_rows_into, reference keys, fp8", 4e-2, rotated_fp8, reference8, -3.0 * moved.numel())


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
    attempt("triton bf16, condition rotated on load", 1e-2, forward, best, [keys[0], x.raw_k], values, x.rope)
    bounds: tuple[tuple[Values, float], ...] = (("mixed", 6e-2), ("fp8", 7e-2))
    for mode, bound in bounds:
        fp8 = partial(attention_fp8.attention_fp8, x.q8, x.segments[mode], x.qk_descale)
        best = sweep(mode, FP8, fp8, s.flops, sweeping)
        attempt(f"triton {mode} {best and astuple(best)}", bound, fp8, best)
    for name, library in attention_table.LIBRARIES.items():
        if name in attention_table.available():
            run = partial(library, x.q, x.joined.k, x.joined.v)
            attempt(f"{name}, joined cache", 1e-2, lambda run=run: run()[0])
    cudnn_frontend(report, x, want)


def cudnn_frontend(report: Report, x: Stream, want: Tensor) -> None:
    """FP8 attention of nvidia-cudnn-frontend on the same data with one scale a tensor, where the package is there."""
    try:
        import cudnn
    except ImportError:
        report.rows.append(Row("cudnn-frontend fp8", note="not installed"))
        return
    f8, f32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    tensors = [t.transpose(1, 2) for t in (x.q, x.joined.k, x.joined.v)]  # [B, H, L, d] views
    descales = [(t.float().abs().amax() / 448).reshape(1, 1, 1, 1) for t in tensors]
    data = [(t.float() / s).to(torch.float8_e4m3fn) for t, s in zip(tensors, descales, strict=True)]
    one = torch.ones(1, 1, 1, 1, device=DEVICE)
    out = torch.empty_like(data[0])
    peak = [torch.zeros(1, 1, 1, 1, device=DEVICE) for _ in range(2)]
    state: dict[str, Any] = {}

    def build() -> None:
        graph = cudnn.pygraph(io_data_type=f8, intermediate_data_type=f32, compute_data_type=f32)
        q, k, v = (graph.tensor_like(t) for t in data)
        s = [
            graph.tensor(name=n, dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=f32)
            for n in ("q", "k", "v", "s", "p", "o")
        ]
        o, _, amax_s, amax_o = graph.sdpa_fp8(
            q=q, k=k, v=v, descale_q=s[0], descale_k=s[1], descale_v=s[2], descale_s=s[3], scale_s=s[4], scale_o=s[5],
            is_inference=True, attn_scale=x.shape.head_dim**-0.5,
        )  # fmt: skip
        o.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
        for tensor in (amax_s, amax_o):
            tensor.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(f32)
        graph.build([cudnn.heur_mode.A])
        factor = [one / 256, one * 256, one * 256]  # of the weights, and of the result
        pack = dict(zip((q, k, v, *s, o, amax_s, amax_o), (*data, *descales, *factor, out, *peak), strict=True))
        room = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=DEVICE)
        state["run"] = lambda: graph.execute(pack, room)

    def check() -> float:
        build()
        state["run"]()
        return relative_l2(out.float().transpose(1, 2) / 256, want)

    report.run("cudnn-frontend fp8 (one scale a tensor)", 8e-2, check, lambda: state["run"](), x.shape.flops)


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
        for implementation in attention_table.available():
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
    parser.add_argument("--no-sweep", action="store_true", help="time only the chosen tiles")
    parser.add_argument("--json", type=Path, help="write every row here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU is visible; this benchmark measures CUDA kernels")
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    report = Report()
    shape = Shape()
    with torch.inference_mode():
        stream = Stream.draw(shape)
        query_key_path(report, stream)
        stream = Stream.draw(shape)
        self_attention(report, stream, not options.no_sweep)
        graph_capture(report, stream)
        del stream
        other_attention(report, shape)
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
