"""The query/key path of LiveAvatar 14B between a projection and the attention: part "qk" of `bench.attention`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels.head_norm_fp8 import head_norm_fp8
from ..kernels.kv_cache import qkv_norm_rope, qkv_norm_rope_fp8, rotate_rows_into
from ..kernels.qk_norm_rope import apply_rope, head_norm, qk_norm_rope
from ..kernels.qk_norm_rope import reference as qk_reference
from ..kernels.qk_rows import Part, Slots, prepare_rows
from ..kernels.rows import Tile
from . import attention_report as reporting
from .attention_report import NAN, Report
from .attention_stream import BF16, DEVICE, Stream, count
from .harness.check import relative_l2

TILES = (Tile(1024, 4), Tile(2048, 8), Tile(512, 2))
E4M3 = torch.float8_e4m3fn


def query_key_path(report: Report, x: Stream, copy_rate: float) -> None:
    """Check and time every kernel of the path; calls take turns on inputs and places in the ring of their own."""
    s, parts = x.shape, x.parts
    qkv, weights, rope, write = parts["qkv"], parts["weights"], parts["rope"], parts["write"]
    q, k, v = qkv.chunk(3, -1)
    scale_q, scale_k = parts["scales"]
    row = s.tokens * s.dim  # elements of q, of k, or of v
    arguments = (qkv, weights[0], weights[1], rope)
    want_q, want_k = qk_reference(q.float(), k.float(), weights[0].float(), weights[1].float(), rope, s.heads)

    def streaming() -> float:
        cache = torch.full((2, 1, s.ring, s.heads, s.head_dim), NAN, device=DEVICE, dtype=BF16)
        got = qkv_norm_rope(*arguments, cache[0], cache[1], write, s.heads)
        assert cache[:, :, s.tokens :].isnan().all(), "rows of other blocks were written"
        assert torch.equal(cache[1, :, : s.tokens].flatten(2), v), "values are copied exactly"
        return max(relative_l2(got, want_q), relative_l2(cache[0, :, : s.tokens], want_k))

    def plain() -> float:
        got = qk_norm_rope(q, k, weights[0], weights[1], rope, s.heads)
        return max(relative_l2(a, b) for a, b in zip(got, (want_q, want_k), strict=True))

    def single() -> float:
        want = qk_reference(q.float(), k.float(), weights[0].float(), weights[1].float(), None, s.heads)[0]
        return relative_l2(head_norm(q, weights[0], s.heads), want)

    def single_fp8() -> float:
        want = qk_reference(q.float(), k.float(), weights[0].float(), weights[1].float(), None, s.heads)[0]
        return relative_l2(head_norm_fp8(q, weights[0], scale_q, s.heads).float() / scale_q[:, None], want)

    def fp8() -> float:
        cache = torch.full((1, s.tokens, s.heads, s.head_dim), 7.0, device=DEVICE).to(E4M3)
        slots = Slots(1, s.tokens, s.tokens)
        got = qkv_norm_rope_fp8(*arguments, cache, None, write, scale_q, scale_k, slots, s.heads)
        pairs = zip((got, cache), (scale_q, scale_k), (want_q, want_k), strict=True)
        return max(relative_l2(y.float() / scale[:, None], w) for y, scale, w in pairs)

    ring, mixed = parts["rings"]["fp8"], parts["rings"]["mixed"]
    ring_k, ring_v = x.joined.ring
    blocks = [qkv, *(torch.randn_like(qkv) for _ in range(s.blocks - 1))]
    writes = [write, *(count(i * s.tokens) for i in range(1, s.blocks))]

    def for_each_block(call: Callable[[Tensor, Tensor], object]) -> list[Callable[[], object]]:
        return [partial(call, block, place) for block, place in zip(blocks, writes, strict=True)]

    def heads_v(block: Tensor) -> Tensor:
        return block[..., 2 * s.dim :].unflatten(-1, (s.heads, s.head_dim))

    def write_bf16(block: Tensor, place: Tensor) -> Tensor:
        return qkv_norm_rope(block, *arguments[1:], ring_k, ring_v, place, s.heads)

    def write_fp8(block: Tensor, place: Tensor) -> Tensor:
        return qkv_norm_rope_fp8(block, *arguments[1:], ring.k8, None, place, scale_q, scale_k, ring.slots, s.heads)

    def write_mixed(block: Tensor, place: Tensor) -> Tensor:
        return qkv_norm_rope_fp8(
            block, *arguments[1:], mixed.k8, mixed.v, place, scale_q, scale_k, mixed.slots, s.heads
        )

    def mixed_values() -> float:
        write_mixed(qkv, write)
        assert torch.equal(mixed.v[:, : s.tokens].flatten(2), v), "values are copied exactly"
        return fp8()

    def values() -> float:
        ring.store_values(heads_v(qkv), write)
        back = ring.with_length(count(s.tokens)).dequantize(torch.ones(s.heads, device=DEVICE))[1]
        return relative_l2(back, heads_v(qkv))

    def both(block: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        q, k = block.chunk(3, -1)[:2]
        return qk_norm_rope(q, k, weights[0], weights[1], rope, s.heads)

    def text_queries(block: Tensor, _: Tensor) -> Tensor:
        return head_norm(block.chunk(3, -1)[0], weights[0], s.heads)

    def text_queries_fp8(block: Tensor, _: Tensor) -> Tensor:
        return head_norm_fp8(block.chunk(3, -1)[0], weights[0], scale_q, s.heads)

    def run(
        name: str, bound: float, check: Callable[[], float], call: Callable[[Tensor, Tensor], object], moved: float
    ) -> None:
        report.run_replayed(name, bound, check, for_each_block(call), moved, copy_rate)

    run("qkv_norm_rope bf16", 1e-2, streaming, write_bf16, 12.0 * row)
    run("qkv_norm_rope fp8 (q, k)", 4e-2, fp8, write_fp8, 6.0 * row)
    run("qkv_norm_rope mixed (q, k fp8, v bf16)", 4e-2, mixed_values, write_mixed, 10.0 * row)
    run("store_values_fp8", 4e-2, values, lambda block, place: ring.store_values(heads_v(block), place), 3.0 * row)
    run("qk_norm_rope bf16", 1e-2, plain, both, 8.0 * row)
    run("head_norm bf16 (text queries)", 1e-2, single, text_queries, 4.0 * row)
    run("head_norm fp8 (text queries)", 4e-2, single_fp8, text_queries_fp8, 3.0 * row)
    rotations(report, x, copy_rate)


def rotations(report: Report, x: Stream, copy_rate: float) -> None:
    """Rotated condition keys: all of them at the start of a stream, those that move before every block."""
    s, scale = x.shape, x.parts["scales"][1]
    keys = [x.raw_k, *(torch.randn_like(x.raw_k) for _ in range(3))]
    outs, outs8 = ([torch.empty_like(k, dtype=dtype) for k in keys] for dtype in (BF16, E4M3))

    def check(out: Tensor, rows: int, factor: Tensor | None) -> float:
        out.copy_(torch.full_like(out, 7.0, dtype=torch.float32))
        rotate_rows_into(x.raw_k[:, :rows], x.rope[:rows], out, factor)
        assert (out[:, rows:].float() == 7).all(), "rows beyond the keys were written"
        got = out[:, :rows].float() / (1 if factor is None else factor[:, None])
        return relative_l2(got, apply_rope(x.raw_k[:, :rows], x.rope[:rows], torch.float32))

    for name, rows, results, factor, width, bound in (
        ("all condition keys, bf16", s.condition, outs, None, 4.0, 1e-2),
        ("reference keys, bf16", s.moving, outs, None, 4.0, 1e-2),
        ("reference keys, fp8", s.moving, outs8, scale, 3.0, 4e-2),
    ):
        calls = [
            partial(rotate_rows_into, k[:, :rows], x.rope[:rows], out, factor)
            for k, out in zip(keys, results, strict=True)
        ]
        first = partial(check, results[0], rows, factor)
        report.run_replayed(f"rotate_rows_into, {name}", bound, first, calls, width * rows * s.dim, copy_rate)


def row_tiles(x: Stream) -> None:
    """Time the row kernel in other shapes of program: channels of a piece x warps."""
    s, parts = x.shape, x.parts
    (weight_q, weight_k), (scale_q, scale_k), rope = parts["weights"], parts["scales"], parts["rope"]
    shape = (1, s.tokens, s.heads, s.head_dim)
    write = count(0)
    sets = []
    for _ in range(3):
        q, k, v = torch.randn(1, s.tokens, 3 * s.dim, device=DEVICE, dtype=BF16).chunk(3, -1)
        bf16 = [torch.empty(shape, device=DEVICE, dtype=BF16) for _ in range(3)]
        e4m3 = [torch.empty(shape, device=DEVICE, dtype=E4M3) for _ in range(2)]
        sets.append(
            {
                "qkv bf16": [
                    Part(q, bf16[0], weight_q, rotate=True),
                    Part(k, bf16[1], weight_k, rotate=True, write=write),
                    Part(v, bf16[2], write=write),
                ],
                "q, k fp8": [
                    Part(q, e4m3[0], weight_q, rotate=True, scale=scale_q),
                    Part(k, e4m3[1], weight_k, rotate=True, scale=scale_k, write=write),
                ],
                "head_norm": [Part(q, bf16[0], weight_q)],
                "rotation": [Part(bf16[1], bf16[2], rotate=True)],
            }
        )
    for name in sets[0]:
        for tiling in TILES:
            calls = [partial(prepare_rows, each[name], s.heads, rope, tiling=tiling) for each in sets]
            print(f"  {name} {tuple(tiling)}: {reporting.replayed(calls):.1f} us", flush=True)
