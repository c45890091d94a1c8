"""The query/key path: Triton kernels against references, gradients, non-finite values, errors."""

from collections.abc import Callable

import pytest
import torch
from kinora.kernels import dispatch, head_norm_fp8, ops
from kinora.kernels import qk_norm_rope as module
from kinora.kernels.cases import Case
from kinora.kernels.kv_cache import static_scales
from kinora.kernels.qk_norm_rope import apply_rope, head_norm, head_norm_reference, qk_norm_rope, rotate_rows
from torch import Tensor


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def table(rows: int, head_dim: int, device: torch.device, batch: int | None = None) -> Tensor:
    angle = torch.randn(*(() if batch is None else (batch,)), rows, head_dim // 2, device=device)
    return torch.stack((angle.cos(), angle.sin()), -1)


@pytest.mark.parametrize("case", [c for c in module.cases() if c.small], ids=lambda c: c.name)
def test_small_cases_match_the_reference(case: Case, kernel_device: torch.device) -> None:
    inputs = case.inputs(kernel_device, torch.Generator().manual_seed(1))
    for found, wanted in zip(module.OP.run(**inputs), module.OP.reference(**inputs), strict=True):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        assert relative(found, wanted) <= case.tolerance


def test_real_cases_name_their_cost() -> None:
    assert all(case.bytes > 0 for case in module.cases() if not case.small)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_result_rounds_where_the_reference_rounds(weight_dtype: torch.dtype, kernel_device: torch.device) -> None:
    q = torch.randn(1, 4, 64, device=kernel_device, dtype=torch.bfloat16)
    weight = torch.randn(64, device=kernel_device, dtype=weight_dtype)
    found = head_norm(q, weight, 2, table(4, 32, kernel_device))
    assert found.dtype == torch.promote_types(torch.bfloat16, weight_dtype)
    assert relative(found, head_norm_reference(q, weight, table(0, 32, kernel_device), 2)) > 0.1, "rotation matters"
    torch.manual_seed(0)
    wide = head_norm(q, weight, 2, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert relative(wide, head_norm_reference(q, weight, None, 2, out_dtype=torch.float32)) < 1e-2


def test_each_sample_turns_by_its_own_table(kernel_device: torch.device) -> None:
    x, rope = torch.randn(2, 5, 3, 32, device=kernel_device), table(4, 32, kernel_device, batch=2)
    torch.testing.assert_close(rotate_rows(x, rope), apply_rope(x, rope))
    torch.testing.assert_close(rotate_rows(x, rope[:1].expand(2, -1, -1, -1)), apply_rope(x, rope[:1]))
    torch.testing.assert_close(rotate_rows(x, rope[:, :0]), x)


def test_rotation_keeps_lengths_and_adds_angles(kernel_device: torch.device) -> None:
    """Independent of the reference: pairs are complex numbers, a table is a phase."""
    x, rope = torch.randn(1, 6, 2, 64, device=kernel_device), table(6, 64, kernel_device)
    turned = rotate_rows(x, rope)
    phase = torch.view_as_complex(rope.contiguous())[None, :, None]
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * phase).flatten(-2)
    torch.testing.assert_close(turned, expected)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(torch.ops.kinora.rotate_rows(turned, rope, None, True), x)


def test_gradients_match_the_reference(kernel_device: torch.device) -> None:
    arguments = [torch.randn(2, 3, 32), torch.randn(2, 3, 32), torch.randn(32), torch.randn(32)]
    rope, weights = table(2, 16, torch.device("cpu")), [torch.randn(2, 3, 2, 16) for _ in range(2)]

    def gradients(registered: bool) -> list[Tensor]:
        leaves = [a.to(kernel_device).requires_grad_() for a in arguments]
        with dispatch.using(registered):
            pair = qk_norm_rope(*leaves, rope.to(kernel_device), 2)
            alone = rotate_rows(leaves[0].unflatten(-1, (2, -1)), rope.to(kernel_device))
        loss = sum((y * w.to(kernel_device)).sum() for y, w in zip((*pair, alone), (*weights, weights[0]), strict=True))
        return list(torch.autograd.grad(loss, leaves))

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_token(value: float, kernel_device: torch.device) -> None:
    x, weight = torch.randn(1, 4, 32, device=kernel_device), torch.ones(32, device=kernel_device)
    x[0, 2, 7] = value
    y = head_norm(x, weight, 2, table(4, 16, kernel_device))
    assert y[0, 2].isnan().any()
    assert y[0, [0, 1, 3]].isfinite().all()


def test_the_ops_pass_opcheck(kernel_device: torch.device) -> None:
    x, weight, rope = torch.randn(1, 3, 32), torch.randn(32), table(3, 16, torch.device("cpu"))
    x, weight, rope = (t.to(kernel_device).requires_grad_(t is not rope) for t in (x, weight, rope))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.kinora.head_norm.default, (x, weight, rope, 2, 1e-6, None), test_utils=checks)
    torch.library.opcheck(
        torch.ops.kinora.qk_norm_rope.default, (x, x.clone(), weight, weight, None, 2, 1e-6, None), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.kinora.rotate_rows.default, (x.unflatten(-1, (2, -1)), rope, None, False), test_utils=checks
    )


def test_a_head_size_without_a_kernel_takes_the_reference(kernel_device: torch.device) -> None:
    x, weight = torch.randn(1, 3, 36, device=kernel_device), torch.randn(36, device=kernel_device)
    rope = table(3, 12, kernel_device)
    torch.testing.assert_close(head_norm(x, weight, 3, rope), head_norm_reference(x, weight, rope, 3))


def test_errors_say_what_to_do() -> None:
    x, weight = torch.randn(1, 4, 32), torch.ones(32)
    with pytest.raises(ValueError, match="3 heads"):
        qk_norm_rope(x, x, weight, weight, None, 3)
    with pytest.raises(ValueError, match="must be \\[32\\]"):
        qk_norm_rope(x, x, weight, weight[:16], None, 2)
    with pytest.raises(ValueError, match="5 rows for 4 tokens"):
        head_norm(x, weight, 2, torch.ones(5, 8, 2))
    with pytest.raises(ValueError, match="\\[L, 8, 2\\]"):
        rotate_rows(x.unflatten(-1, (2, -1)), torch.ones(4, 16, 2))
    with pytest.raises(ValueError, match="2 samples for a batch of 1"):
        ops.rotate_rows(x.unflatten(-1, (2, -1)), torch.ones(2, 4, 8, 2))


# Queries in e4m3


def fp8_steps(found: Tensor, wanted: Tensor) -> Tensor:
    """How many e4m3 numbers lie between two, both signs in one order."""
    ordered = [torch.where(b < 128, b, 128 - b) for b in (t.view(torch.uint8).int() for t in (found, wanted))]
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.parametrize("case", [c for c in head_norm_fp8.cases() if c.small], ids=lambda c: c.name)
def test_queries_in_e4m3_are_those_of_head_norm(case: Case, kernel_device: torch.device) -> None:
    inputs = case.inputs(kernel_device, torch.Generator().manual_seed(1))
    found = ops.head_norm_fp8(**inputs)
    wide = head_norm(inputs["x"], inputs["weight"], inputs["num_heads"]).float() * inputs["scale"][:, None]
    assert found.shape == wide.shape and found.dtype == torch.float8_e4m3fn and found.is_contiguous()
    assert wide.abs().max() <= 448.5, "a static scale leaves the range of e4m3"
    # sums in another order, a value between two numbers goes to the other one
    steps = fp8_steps(found, wide.clamp(-448, 448).to(found.dtype))
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.02


def test_e4m3_queries_saturate_and_keep_bad_values_in_their_token(kernel_device: torch.device) -> None:
    x, weight = torch.randn(1, 4, 32, device=kernel_device), torch.ones(32, device=kernel_device)
    x[0, 2, 7] = float("nan")
    found = ops.head_norm_fp8(x, weight, torch.full((2,), 1e6, device=kernel_device), 2).float()
    assert found[0, 2].isnan().all()
    assert (found[0, [0, 1, 3]].abs() == 448).all()


@pytest.mark.parametrize("spread", [lambda s: s[:1].expand(4), lambda s: s.repeat_interleave(2)[::2]])
def test_scales_of_any_stride(spread: Callable[[Tensor], Tensor], kernel_device: torch.device) -> None:
    x, weight = torch.randn(1, 3, 64, device=kernel_device), torch.randn(64, device=kernel_device)
    scale = spread(torch.tensor([1.0, 2.0, 4.0, 8.0], device=kernel_device))
    found = ops.head_norm_fp8(x, weight, scale, 4)
    assert torch.equal(
        found.float(), ops.head_norm_fp8(x, weight, scale.clone(memory_format=torch.contiguous_format), 4).float()
    )
    assert relative(found, head_norm_fp8.reference(x, weight, scale, 4)) < 1e-2


def test_the_e4m3_op_passes_opcheck_and_says_what_does_not_fit(kernel_device: torch.device) -> None:
    x, weight = torch.randn(2, 3, 32, device=kernel_device), torch.randn(32, device=kernel_device)
    scale = static_scales(weight, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.kinora.head_norm_fp8.default, (x, weight, scale, 2, 1e-6), test_utils=checks)
    with pytest.raises(ValueError, match="heads of 8 channels"):
        ops.head_norm_fp8(x, weight, scale, 4)
    with pytest.raises(ValueError, match=r"must be float32 \[2\]"):
        ops.head_norm_fp8(x, weight, scale[:1], 2)
