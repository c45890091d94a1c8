"""Attention kernels against references: segments, lengths, masks, gradients, FP8, caches, errors."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from kinora.bench import attention as bench
from kinora.bench import attention_report
from kinora.bench.attention_stream import Shape, Stream
from kinora.kernels import (
    attention_fp8,
    dispatch,
    fp8_values,
    kv_cache,
    rope_attention,
)
from kinora.kernels.attention_fp8 import Fp8Segment
from kinora.kernels.cases import Case, Op
from kinora.kernels.kv_cache import JoinedCache, qkv_norm_rope, qkv_norm_rope_fp8, rotate_rows_into, static_scales
from kinora.kernels.qk_norm_rope import apply_rope
from kinora.kernels.qk_rows import Slots
from torch import Tensor

attend, plain = rope_attention.rope_attention, rope_attention.reference
attend_fp8 = attention_fp8.attention_fp8


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def table(rows: int, head_dim: int, device: torch.device) -> Tensor:
    angle = torch.randn(rows, head_dim // 2, device=device)
    return torch.stack((angle.cos(), angle.sin()), -1)


def count(n: int, device: torch.device) -> Tensor:
    return torch.tensor([n], dtype=torch.int32, device=device)


@pytest.mark.parametrize("case", [c for c in rope_attention.cases() if c.small], ids=lambda c: c.name)
def test_small_cases_match_the_reference(case: Case, kernel_device: torch.device) -> None:
    inputs = case.inputs(kernel_device, torch.Generator().manual_seed(1))
    found, wanted = attend(**inputs), plain(**inputs)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert relative(found, wanted) <= case.tolerance


def test_real_cases_name_their_cost() -> None:
    real = [case for case in rope_attention.cases() if not case.small]
    assert real[0].flops == 4 * 3168 * 15312 * 5120
    assert all(case.bytes > 0 for case in real)


def gradients(registered: bool, leaves: list[Tensor], weights: Tensor, **options: object) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    half = (len(leaves) - 1) // 2
    with dispatch.using(registered):
        out = attend(leaves[0], leaves[1 : 1 + half], leaves[1 + half :], **options)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("queries", [20, 133])
@pytest.mark.parametrize("kind", ["plain", "table", "lengths", "all tables", "all lengths", "mask"])
def test_gradients_match_the_reference(kind: str, queries: int, kernel_device: torch.device) -> None:
    """133 queries rotate once beforehand, 20 on load; a segment without valid keys has zero gradients."""
    shapes = [(2, queries, 2, 32), (2, 37, 2, 32), (2, 61, 2, 32), (2, 37, 2, 32), (2, 61, 2, 32)]
    leaves = [torch.randn(shape, device=kernel_device) for shape in shapes]
    mask = torch.rand(queries, 98, device=kernel_device) > 0.5
    mask[3] = False  # a query that attends nothing
    options: dict[str, object] = {
        "plain": {},
        "table": {"ropes": [None, table(40, 32, kernel_device)]},
        "lengths": {"lengths": [count(0, kernel_device), 45]},
        "all tables": {"ropes": [table(rows, 32, kernel_device) for rows in (37, 40)]},
        "all lengths": {"lengths": [count(rows, kernel_device) for rows in (20, 45)]},
        "mask": {"mask": mask},
    }[kind]
    weights = torch.randn(shapes[0], device=kernel_device)
    for found, wanted in zip(
        gradients(True, leaves, weights, **options), gradients(False, leaves, weights, **options), strict=True
    ):
        torch.testing.assert_close(found, wanted.nan_to_num(), rtol=1e-4, atol=2e-5)


def test_half_precision_gradients_stay_close(kernel_device: torch.device) -> None:
    leaves = [torch.randn(1, n, 2, 64, device=kernel_device).bfloat16() for n in (70, 90, 90)]
    weights = torch.randn(1, 70, 2, 64, device=kernel_device)
    wide = gradients(False, [leaf.float() for leaf in leaves], weights)
    for found, wanted in zip(gradients(True, leaves, weights), wide, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found, wanted) < 1e-2


@pytest.mark.parametrize("plain_keys", [False, True])
def test_the_op_without_kernels_computes_the_reference(plain_keys: bool) -> None:
    """What a tracer on a machine without a GPU runs."""
    leaves = [torch.randn(1, n, 2, 16) for n in (4, 5, 6, 5, 6)]
    options: dict[str, object] = {
        "ropes": [table(3, 16, torch.device("cpu")), None],
        "lengths": [None, count(2, leaves[0].device)],
    }
    options = {} if plain_keys else options
    weights = torch.randn(1, 4, 2, 16)
    for found, wanted in zip(
        gradients(True, leaves, weights, **options), gradients(False, leaves, weights, **options), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_log_sum_exp_is_that_of_the_scores(kernel_device: torch.device) -> None:
    q, k = torch.randn(2, 9, 3, 32, device=kernel_device), torch.randn(2, 40, 3, 32, device=kernel_device)
    rope, length = table(7, 32, kernel_device), count(33, kernel_device)
    _, lse = torch.ops.kinora.rope_attention(q, [k], [k], [rope], [length], None)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, apply_rope(k, rope)[:, :33]) / 32**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_strided_inputs_and_mixed_dtypes(head_dim: int, kernel_device: torch.device) -> None:
    """Slices of one projection; float32 queries over half-precision keys give a float32 result."""
    qkv = torch.randn(2, 11, 3, 2, head_dim, device=kernel_device)
    q, k, v = qkv.unbind(2)
    torch.testing.assert_close(attend(q, [k], [v]), plain(q, [k], [v]), rtol=1e-4, atol=1e-5)
    half = attend(q, [k.bfloat16()], [v.bfloat16()])
    assert half.dtype == torch.float32
    assert relative(half, plain(q, [k], [v])) < 1e-2


def test_rows_beyond_the_length_have_no_effect(kernel_device: torch.device) -> None:
    q, k, v = (torch.randn(1, n, 2, 32, device=kernel_device) for n in (5, 50, 50))
    wanted = plain(q, [k], [v], lengths=[31])
    k[:, 31:], v[:, 31:] = float("nan"), float("inf")
    torch.testing.assert_close(attend(q, [k], [v], lengths=[count(31, kernel_device)]), wanted, rtol=1e-4, atol=1e-5)
    assert attend(q, [k], [v], lengths=[count(0, kernel_device)]).count_nonzero() == 0


def test_a_bad_value_spreads_as_stated(kernel_device: torch.device) -> None:
    q, k, v = (torch.randn(1, n, 2, 32, device=kernel_device) for n in (5, 40, 40))
    q[0, 2, 1, 3] = float("nan")
    y = attend(q, [k], [v])
    assert y[0, 2, 1].isnan().all() and y.isnan().sum() == 32
    k[0, 7, 0, 0] = float("nan")
    y = attend(q, [k], [v])
    assert y[0, :, 0].isnan().all() and y[0, [0, 1, 3, 4], 1].isfinite().all()


def test_attention_passes_opcheck(kernel_device: torch.device) -> None:
    q, k, v = (torch.randn(1, 5, 2, 16, device=kernel_device, requires_grad=True) for _ in range(3))
    arguments = (q, [k, v], [v, k], [None, table(5, 16, kernel_device)], [None, count(3, kernel_device)], None)
    torch.library.opcheck(
        torch.ops.kinora.rope_attention.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


# FP8


def stream(
    values: str, device: torch.device, blocks: int = 2, tokens: int = 140, heads: int = 2, head_dim: int = 64
) -> tuple[Tensor, Fp8Segment, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Blocks written to an FP8 ring and to a float32 one: q8, ring, qk_descale, float32 (k, v), (q, scale_k)."""
    dim = heads * head_dim
    weights = [torch.rand(dim, device=device) + 0.5 for _ in range(2)]
    scales = [static_scales(weight, heads) for weight in weights]
    rope = table(tokens, head_dim, device)
    ring = Fp8Segment.allocate(1, blocks, tokens, heads, head_dim, values, device=device)  # type: ignore[arg-type]
    wide_k, wide_v = torch.zeros(2, 1, blocks * tokens, heads, head_dim, device=device)
    for block in range(blocks):
        qkv = torch.randn(1, tokens, 3 * dim, device=device) * 4.0**block
        write = count(block * tokens, device)
        ring_v = ring.v if values == "mixed" else None
        q8 = qkv_norm_rope_fp8(qkv, *weights, rope, ring.k8, ring_v, write, *scales, ring.slots, heads)
        if values == "fp8":
            ring.store_values(qkv[..., 2 * dim :].unflatten(-1, (heads, head_dim)), write)
        q = kv_cache.qkv_norm_rope_reference(qkv, *weights, rope, wide_k, wide_v, write, heads)
    return q8, ring, 1 / (scales[0] * scales[1]), (wide_k, wide_v), (q, scales[1])


@pytest.mark.parametrize(("values", "bound"), [("fp8", 7e-2), ("mixed", 5e-2)])
def test_fp8_attention_over_a_ring_and_condition_keys(values: str, bound: float, kernel_device: torch.device) -> None:
    q8, ring, qk_descale, (k, v), (q, scale_k) = stream(values, kernel_device)
    condition_k, condition_v = torch.randn(2, 1, 70, 2, 64, device=kernel_device)
    rope = table(40, 64, kernel_device)
    condition = Fp8Segment.allocate(1, 1, 70, 2, 64, values, device=kernel_device)  # type: ignore[arg-type]
    condition.store_condition(condition_k, condition_v, rope, scale_k)
    for rows in (None, 0, 40, 200):
        length = None if rows is None else count(rows, kernel_device)
        segments = [ring.with_length(length), condition]
        found = attend_fp8(q8, segments, qk_descale)
        assert found.dtype == torch.bfloat16
        # weights round against the running maximum in the kernel, against the last one in the reference
        assert relative(found, attention_fp8.reference(q8, segments, qk_descale)) < 2.5e-2
        exact = plain(q, [k, condition_k], [v, condition_v], [None, rope], [rows, None])
        assert relative(found, exact) < bound


def test_fp8_values_keep_one_scale_a_slot_head_and_channel(kernel_device: torch.device) -> None:
    slots = Slots(2, 130, 256)
    v = torch.randn(2, 130, 3, 32, device=kernel_device) * torch.logspace(-3, 3, 32, device=kernel_device)
    v[..., 5] = 0
    v8 = torch.full((2, 3, 32, 512), 7.0, device=kernel_device).to(torch.float8_e4m3fn)
    descale = torch.full((2, 2, 3, 32), float("nan"), device=kernel_device)
    fp8_values.store_values_fp8(v, v8, descale, slots, count(130, kernel_device))
    stored = v8.float()
    assert (stored[..., :256] == 7).all() and descale[:, 0].isnan().all(), "the other slot is untouched"
    assert (stored[..., 256 + 130 :] == 0).all(), "padding is zero"
    torch.testing.assert_close(descale[:, 1], v.abs().amax(1).clamp(min=1e-12) / 448)
    back = (stored[..., 256 : 256 + 130] * descale[:, 1, ..., None]).permute(0, 3, 1, 2)
    torch.testing.assert_close(back, v, rtol=1.01 * 2**-4, atol=0.01 * float(descale[:, 1].min()), check_dtype=False)


def test_static_scales_never_overflow(kernel_device: torch.device) -> None:
    """The worst row: all energy in one channel, the one with the largest weight of its head."""
    weight = torch.tensor([0.1, -3.0, 0.5, 1.0] * 8, device=kernel_device)
    scale = static_scales(weight, 2)
    x = torch.zeros(1, 1, 96, device=kernel_device)
    x[0, 0, [1, 33]] = 1e4
    k8 = torch.zeros(1, 128, 2, 16, dtype=torch.float8_e4m3fn, device=kernel_device)
    write = count(0, kernel_device)
    q8 = qkv_norm_rope_fp8(x, weight, weight, None, k8, None, write, scale, scale, Slots(1, 128, 128), 2)
    assert q8.float().isfinite().all() and q8.float().abs().max() == 448
    assert k8[:, 0].float().abs().max() == 448


# Caches


WRITERS = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in (kv_cache.OP, kv_cache.FP8_OP, fp8_values.OP)
    for case in op.cases()
    if case.small
]


@pytest.mark.parametrize(("op", "case"), WRITERS)
def test_a_block_is_written_where_it_belongs(op: Op, case: Case, kernel_device: torch.device) -> None:
    found, wanted = (case.inputs(kernel_device, torch.Generator().manual_seed(2)) for _ in range(2))
    results = [(op.run(**found), op.reference(**wanted))]
    for ours, theirs in results + [(found[name], wanted[name]) for name in op.mutates]:
        if theirs is not None:  # an op without a result, a ring without values
            assert ours.dtype == theirs.dtype
            assert relative(ours, theirs) <= case.tolerance


@pytest.mark.parametrize("head_dim", [8, 24])
def test_a_head_size_without_a_kernel_takes_the_reference(head_dim: int, kernel_device: torch.device) -> None:
    block = kv_cache._block_inputs(3, 8, 2, 2, head_dim, torch.float32)
    fp8 = kv_cache._fp8_case("", 3, Slots(2, 3, 4), 2, 2, head_dim, values=torch.bfloat16).inputs
    for op, inputs in ((kv_cache.OP, block), (kv_cache.FP8_OP, fp8)):
        found, wanted = (inputs(kernel_device, torch.Generator().manual_seed(2)) for _ in range(2))
        assert torch.equal(op.run(**found).float(), op.reference(**wanted).float())
        assert all(torch.equal(found[name].float(), wanted[name].float()) for name in op.mutates)
    x, out = torch.randn(1, 3, 2, head_dim, device=kernel_device), torch.zeros(1, 4, 2, head_dim, device=kernel_device)
    rope = table(2, head_dim, kernel_device)
    rotate_rows_into(x, rope, out)
    assert torch.equal(out[:, :3], apply_rope(x, rope))


@pytest.mark.parametrize("case", [c for c in attention_fp8.cases() if c.small], ids=lambda c: c.name)
def test_small_fp8_cases_match_the_reference(case: Case, kernel_device: torch.device) -> None:
    inputs = case.inputs(kernel_device, torch.Generator().manual_seed(3))
    assert relative(attend_fp8(**inputs), attention_fp8.reference(**inputs)) <= case.tolerance


def test_the_fp8_op_without_kernels_lies_as_its_fake_says() -> None:
    given = attention_fp8.cases()[2].inputs(torch.device("cpu"), torch.Generator().manual_seed(3))
    assert attend_fp8(**given).is_contiguous()


def test_descales_of_any_stride(kernel_device: torch.device) -> None:
    given = attention_fp8.cases()[2].inputs(kernel_device, torch.Generator().manual_seed(3))
    wanted = attend_fp8(**given)

    def apart(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, 1e3)), -1)[..., 0]

    segments = [replace(s, v_descale=apart(s.v_descale)) for s in given["segments"]]
    found = attend_fp8(given["q8"], segments, apart(given["qk_descale"]))
    assert torch.equal(found, wanted)


def test_a_joined_cache_attends_like_two_segments(kernel_device: torch.device) -> None:
    cache = JoinedCache.allocate(1, 6, 20, 2, 32, dtype=torch.float32, device=kernel_device)
    qkv, weight = torch.randn(1, 10, 192, device=kernel_device), torch.rand(64, device=kernel_device)
    q = qkv_norm_rope(qkv, weight, weight, None, *cache.ring, count(0, kernel_device), 2)
    condition_k, condition_v = torch.randn(2, 1, 6, 2, 32, device=kernel_device)
    rope = table(4, 32, kernel_device)
    rotate_rows_into(condition_k, rope, cache.condition[0])
    cache.condition[1].copy_(condition_v)
    k, v = cache.valid(10)
    assert k.data_ptr() == cache.k.data_ptr(), "no copy"
    ring_k, ring_v = cache.ring
    wanted = plain(q, [ring_k, condition_k], [ring_v, condition_v], [None, rope], [10, None])
    torch.testing.assert_close(attend(q, [k], [v]), wanted, rtol=1e-4, atol=1e-5)


def test_cache_ops_pass_opcheck(kernel_device: torch.device) -> None:
    inputs = kv_cache.cases()[1].inputs(kernel_device, torch.Generator().manual_seed(0))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.kinora.qkv_norm_rope.default, (*inputs.values(), 1e-6), test_utils=checks)


# Errors


def test_errors_say_what_to_do(kernel_device: torch.device) -> None:
    q = torch.randn(1, 4, 2, 16, device=kernel_device)
    with pytest.raises(ValueError, match="segments differ: 0 keys"):
        attend(q, [], [])
    with pytest.raises(ValueError, match="segment 0 has keys"):
        attend(q, [q[:, :, :1]], [q])
    with pytest.raises(ValueError, match="give all one dtype"):
        attend(q, [q, q], [q, q.bfloat16()])
    with pytest.raises(ValueError, match="rotary table"):
        attend(q, [q], [q], [torch.ones(5, 8, 2, device=kernel_device)])
    with pytest.raises(ValueError, match="exclude each other"):
        attend(
            q,
            [q],
            [q],
            lengths=[count(2, kernel_device)],
            mask=torch.ones(4, 4, dtype=torch.bool, device=kernel_device),
        )
    with pytest.raises(ValueError, match="must be bool \\[4, 4\\]"):
        attend(q, [q], [q], mask=torch.ones(4, 5, dtype=torch.bool, device=kernel_device))
    with pytest.raises(ValueError, match="'int8' are not known"):
        Fp8Segment.allocate(1, 1, 4, 2, 16, "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be e4m3"):
        attend_fp8(q, [], torch.ones(2))
    segment = Fp8Segment.allocate(1, 2, 5, 2, 32)
    with pytest.raises(ValueError, match="do not fill a slot"):
        segment.store_values(torch.randn(1, 4, 2, 32))
    with pytest.raises(ValueError, match="both must be dense"):
        half = replace(Fp8Segment.allocate(2, 2, 5, 4, 32), v_descale=segment.v_descale.repeat(2, 1, 1, 1))
        replace(half, v=half.v[:, :2]).store_values(torch.randn(2, 5, 2, 32))
    with pytest.raises(ValueError, match="lie side by side"):
        rotate_rows_into(q, None, q.repeat(1, 1, 1, 2)[..., :16])
    with pytest.raises(ValueError, match="no segment"):
        attend_fp8(torch.zeros(1, 4, 2, 32).to(torch.float8_e4m3fn), [], torch.ones(2))
    with pytest.raises(ValueError, match="a block of 9 tokens needs"):
        qkv_norm_rope(torch.randn(1, 9, 96), torch.ones(32), torch.ones(32), None, q, q, count(0, q.device), 2)
    with pytest.raises(ValueError, match="exactly when the result is e4m3"):
        rotate_rows_into(q, None, q.clone(), torch.ones(2))


# The benchmark


def run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the calls that would be timed is made once and took a microsecond."""

    def replayed(calls: Sequence[Callable[[], object]]) -> float:
        calls[0]()
        return 1.0

    monkeypatch.setattr(attention_report, "microseconds", lambda run: 1.0)
    monkeypatch.setattr(attention_report, "replayed", replayed)


def test_the_benchmark_checks_every_kernel(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All checks of `bench.attention` hold at small sizes; on a machine without a GPU only the libraries refuse."""
    run_once(monkeypatch)
    report, shape = bench.Report(), Shape(tokens=12, blocks=2, condition=10, moving=5, heads=2, head_dim=64)
    bench.query_key_path(report, Stream.draw(shape), 1e6)
    bench.row_tiles(Stream.draw(replace(shape, tokens=2)))
    bench.self_attention(report, Stream.draw(shape), sweeping=False)
    bench.other_attention(report, shape)
    bench.training(report, torch.float32, 1e-4, 24, (30, 10))
    failed = [row for row in report.rows if row.note and not row.name.startswith(("cudnn", "sdpa"))]
    assert [row.name for row in failed if "sdpa" not in row.name and "table entry" not in row.name] == []
    assert sum("triton" in row.name or "rope" in row.name for row in report.rows) >= 13
    assert "TB/s" in report.table()


def test_the_benchmark_does_not_time_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    run_once(monkeypatch)
    report = bench.Report()
    for error in (0.5, float("nan")):
        report.run("wrong", 1e-2, lambda error=error: error, lambda: None, 1.0)
        assert report.rows[-1].note == "FAIL" and report.rows[-1].rate == ""
