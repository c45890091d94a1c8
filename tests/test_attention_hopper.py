"""The Hopper kernel of attention: it compiles without a GPU, its parts merge; on a Hopper GPU, its numbers."""

import subprocess
import sys
import textwrap
from collections.abc import Sequence

import pytest
import torch
from kinora.kernels import attention_fp8, attention_hopper, attention_merge
from kinora.kernels.attention_fp8 import Fp8Segment
from kinora.kernels.fp8_values import quantize_values
from kinora.kernels.kv_cache import quantize_heads
from torch import Tensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9))


def exact(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, L, H, d] and log-sum-exp [B, H, L] in float32; `scale` [H] multiplies the scores."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale[:, None, None]
    if k.shape[1] == 0:
        return torch.zeros(q.shape, device=q.device), scores.logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()), scores.logsumexp(-1)


def test_parts_of_divided_tiles_merge_to_the_whole(kernel_device: torch.device) -> None:
    programs, rows, queries, keys, heads, d = 5, 32, 50, 41, 4, 32
    tiles, rest = 2 * heads, 3  # two tiles a head; the last three are divided among five programs
    scores = torch.randn(heads, queries, keys) * 3
    v = torch.randn(heads, keys, d)
    part = torch.full((2 * programs, rows, d), float("nan"))
    peak = torch.full((2 * programs, rows, 2), float("nan"))
    for p in range(programs):
        first = p * rest // programs
        for piece in range(2):
            begin = max(p * rest - (first + piece) * programs, 0) * keys // programs
            stop = min((p + 1) * rest - (first + piece) * programs, programs) * keys // programs
            if (p + 1) * rest <= (first + piece) * programs:
                continue
            head, half = divmod(tiles - rest + first + piece, 2)
            seen = scores[head, half * rows : (half + 1) * rows, begin:stop]
            top = seen.amax(-1) + torch.randn(seen.shape[0])  # any reference point will do
            weights = (seen - top[:, None]).exp()
            number = 2 * p + piece
            part[number, : len(seen)] = weights @ v[head, begin:stop]
            peak[number, : len(seen)] = torch.stack((top / torch.log(torch.tensor(2.0)), weights.sum(-1)), -1)
    out = torch.full((1, queries, heads, d), -1.0, device=kernel_device)
    lse = torch.full((1, heads, queries), -1.0, device=kernel_device)
    attention_merge.merge(part.to(kernel_device), peak.to(kernel_device), out, lse, tiles, rest)
    wanted, whole = (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)
    # tiles 5, 6 and 7: the second half of head 2, and head 3
    assert torch.allclose(out[0, rows:, 2].cpu(), wanted[rows:, 2], atol=1e-5)
    assert torch.allclose(out[0, :, 3].cpu(), wanted[:, 3], atol=1e-5)
    assert torch.allclose(lse[0, 3].cpu(), whole[3], atol=1e-4)
    assert (out[0, :, :2] == -1).all() and (out[0, :rows, 2] == -1).all() and (lse[0, :2] == -1).all()


COMPILE = """
    import sys
    import triton
    from kinora.kernels.attention_hopper_kernel import hopper_kernel
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    fp8, segments = sys.argv[1] == "fp8", int(sys.argv[2])
    name, dtype = ("fp8e4nv", gl.float8e4nv) if fp8 else ("bf16", gl.bfloat16)

    def tiles(block):
        return f"tensordesc<{name}{block},{gl.NVMMASharedLayout.get_default_for(block, dtype)!r}>"

    keys, values = (tiles([8, 2, 4, 2, 128]), tiles([128, 128])) if fp8 else [tiles([1, 128, 128])] * 2
    known = {"GROUPS": 3 if fp8 else 2, "STAGES": 4 if fp8 else 2}
    signature = {
        "q_desc": tiles([1, 64, 128]), "k_desc_0": keys, "v_desc_0": values, "k_desc_1": keys, "v_desc_1": values,
        "length_ptr_0": "*i32", "length_ptr_1": "*i32", "descale_ptr_0": "*fp32", "descale_ptr_1": "*fp32",
        "qk_descale_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32", "part_ptr": "*fp32", "peak_ptr": "*fp32",
        "layout_0": ("i32",) * 3, "layout_1": ("i32",) * 3, "queries": "i32", "heads": "i32", "tiles": "i32",
        "scale": "fp32",
    }
    absent = [n for n in signature if n.endswith("_1") and segments == 1 and n != "layout_1"]
    absent += ["lse_ptr"] if fp8 else [n for n in signature if "descale" in n]
    known.update(dict.fromkeys(absent))
    signature.update(dict.fromkeys(known, "constexpr"))
    places = {(hopper_kernel.arg_names.index(n),): value for n, value in known.items()}
    source = GluonASTSource(hopper_kernel, signature, places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(made.metadata.shared, made.asm["ptx"].count("cp.async.bulk.tensor"))
    print(made.asm["ptx"].count("m64n128k32.f32.e4m3" if fp8 else "m64n128k16.f32.bf16"))
"""


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
@pytest.mark.parametrize("segments", [1, 2])
def test_it_compiles_for_hopper_without_a_gpu(dtype: str, segments: int) -> None:
    """Also that nothing moves between threads: the kernel asserts that its conversions of layouts are trivial."""
    command = [sys.executable, "-c", textwrap.dedent(COMPILE), dtype, str(segments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    shared, copies, products = (int(n) for n in ran.stdout.split())
    assert shared <= 227 * 1024
    assert copies >= 2 + 2 * segments  # queries of each warpgroup; keys and values of each segment
    assert products == (12 if dtype == "fp8" else 16)  # of a tile of scores: d / 32 a warpgroup, d / 16 a warpgroup


def test_what_it_serves() -> None:
    q = torch.zeros(1, 4, 2, 128, dtype=torch.bfloat16)
    assert not attention_hopper.serves_half(q, [q], [q], [None], None)  # a CPU
    assert attention_hopper.has_map(q)
    assert attention_hopper.has_map(torch.zeros(2, 4, 3, 2, 128)[:, :, 1])  # keys inside a joined projection
    assert not attention_hopper.has_map(q.transpose(2, 3).contiguous().transpose(2, 3))
    assert not attention_hopper.has_map(torch.zeros(1, 4, 2, 256)[..., :128])  # heads that lie apart
    assert not attention_hopper.has_map(torch.zeros(1, 4, 257, dtype=torch.bfloat16)[..., 1:].unflatten(2, (2, 128)))


def count(n: int) -> Tensor:
    return torch.tensor([n], dtype=torch.int32, device="cuda")


def fp8_call(
    queries: int, ring: tuple[int, int], length: int, condition: int, heads: int, batch: int
) -> tuple[Tensor, list[Fp8Segment], Tensor]:
    """A ring (slots, rows of each) with `length` valid rows, and condition keys if there are any."""
    scale = torch.linspace(4.0, 8.0, heads, device="cuda")

    def segment(slots: int, rows: int, valid: Tensor | None) -> Fp8Segment:
        made = Fp8Segment.allocate(batch, slots, rows, heads, 128, length=valid, device="cuda")
        for slot in range(slots):
            place = slice(slot * made.slots.stride, slot * made.slots.stride + rows)
            made.k8[:, place] = quantize_heads(torch.randn(batch, rows, heads, 128, device="cuda"), scale)
            values, descale = quantize_values(torch.randn(batch, rows, heads, 128, device="cuda") * (1 + slot))
            made.v[..., place] = values
            assert made.v_descale is not None
            made.v_descale[:, slot] = descale
        return made

    segments = [segment(*ring, count(length))] + ([segment(1, condition, None)] if condition else [])
    return quantize_heads(torch.randn(batch, queries, heads, 128, device="cuda"), scale), segments, 1 / scale**2


def run_fp8(q8: Tensor, segments: Sequence[Fp8Segment], qk_descale: Tensor) -> Tensor:
    return attention_hopper.forward_fp8(
        q8,
        [s.k8 for s in segments],
        [s.v for s in segments],
        [s.v_descale for s in segments],
        [s.length for s in segments],
        qk_descale,
        [n for s in segments for n in (s.slots.count, s.slots.rows, s.slots.stride)],
    )


FP8_CALLS = {
    "tails, a second slot partly filled, two samples": (21, (2, 130), 200, 9, 2, 2),
    "several slots and units of values": (300, (4, 200), 500, 333, 3, 1),
    "one query, an empty ring": (1, (2, 128), 0, 5, 1, 1),
    "an odd number of tiles": (130, (1, 20), 0, 5, 1, 1),
    "one segment": (77, (3, 300), 900, 0, 5, 2),
    "no keys": (200, (2, 128), 0, 0, 2, 1),
    "whole rounds and a divided one": (3168, (4, 396), 1584, 330, 40, 1),
}


@on_hopper
@pytest.mark.parametrize("name", FP8_CALLS)
def test_fp8_on_hopper(name: str) -> None:
    q8, segments, qk_descale = fp8_call(*FP8_CALLS[name])
    found = run_fp8(q8, segments, qk_descale)
    pairs = [s.dequantize(torch.ones_like(qk_descale)) for s in segments]
    k, v = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    wanted, _ = exact(q8, k, v, qk_descale * 128**-0.5)
    assert relative(found, wanted) < 3e-2  # the rounding of the weights
    assert torch.equal(found, run_fp8(q8, segments, qk_descale))


HALF_CALLS = {
    "tails, two samples": (21, [9, 260], [None, 200], 2, 2),
    "lengths inside the first tile and across several": (300, [333, 800], [100, 500], 3, 1),
    "one query, an empty segment": (1, [5, 256], [None, 0], 1, 1),
    "no keys": (200, [128, 64], [0, 0], 2, 1),
    "one key": (50, [1], [None], 1, 1),
    "whole rounds and a divided one": (3168, [330, 1584], [None, 1584], 40, 1),
}


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF_CALLS)
def test_half_precision_on_hopper(name: str, dtype: torch.dtype) -> None:
    queries, rows, lengths, heads, batch = HALF_CALLS[name]
    q = torch.randn(batch, queries, heads, 128, device="cuda").to(dtype)
    keys = [torch.randn(batch, n, 2, heads, 128, device="cuda").to(dtype)[:, :, 0] for n in rows]  # rows apart
    values = [torch.randn(batch, n, heads, 128, device="cuda").to(dtype) for n in rows]
    spans = [n if length is None else length for n, length in zip(rows, lengths, strict=True)]
    k = torch.cat([x[:, :n] for x, n in zip(keys, spans, strict=True)], 1)
    v = torch.cat([x[:, :n] for x, n in zip(values, spans, strict=True)], 1)
    wanted, whole = exact(q, k, v, torch.full((heads,), 128**-0.5, device="cuda"))
    for x, n in zip((*keys, *values), spans * 2, strict=True):
        x[:, n:] = float("nan")  # what lies beyond the valid rows has no effect
    on_device = [None if length is None else count(length) for length in lengths]
    found, lse = attention_hopper.forward_half(q, keys, values, on_device)
    assert relative(found, wanted) < (4e-3 if dtype == torch.bfloat16 else 1e-3)
    assert torch.allclose(lse, whole, atol=1e-4)


@on_hopper
def test_a_captured_call_follows_the_length_on_the_device() -> None:
    q8, segments, qk_descale = fp8_call(500, (4, 600), 600, 300, 4, 1)
    assert attention_hopper.serves_fp8(
        q8,
        [s.k8 for s in segments],
        [s.v for s in segments],
        [s.v_descale for s in segments],
        [n for s in segments for n in (s.slots.count, s.slots.rows, s.slots.stride)],
    )
    length = segments[0].length
    assert length is not None
    attention_fp8.attention_fp8(q8, segments, qk_descale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention_fp8.attention_fp8(q8, segments, qk_descale)
    for rows in (0, 600, 1799, 2400):
        length.fill_(rows)
        graph.replay()
        assert torch.equal(found, run_fp8(q8, segments, qk_descale)), rows
        assert relative(found, attention_fp8.reference(q8, segments, qk_descale)) < 4e-2, rows
