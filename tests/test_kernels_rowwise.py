"""The row-wise ops in Triton against their references: values, gradients, strides, rounding points, NaN, errors."""

from collections.abc import Iterator

import pytest
import torch
from kinora.bench import rowwise
from kinora.bench.harness.check import gradients, in_float32, poisoned, tensors
from kinora.kernels import adaln, audio_residual, gated_residual, ops, residual_norm
from kinora.kernels.cases import Case, Op
from kinora.kernels.dispatch import using
from torch import Tensor

OPS = (adaln.OP, residual_norm.OP, gated_residual.OP, audio_residual.OP)
SMALL = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases() if case.small]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def error(result: Tensor, expected: Tensor) -> float:
    """Relative L2 error; types, shapes and finiteness must agree."""
    assert result.dtype == expected.dtype and result.shape == expected.shape and result.is_contiguous()
    wide, exact = result.double(), expected.double()
    return ((wide - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def draw(case: Case, device: torch.device) -> dict[str, object]:
    return dict(case.inputs(device, torch.Generator().manual_seed(0)))


def compare_gradients(op: Op, inputs: dict[str, object], tolerance: float) -> None:
    expected = gradients(op.reference, inputs)
    for name, grad in gradients(op.run, inputs).items():
        assert error(grad.contiguous(), expected[name]) < tolerance, name


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_values(op: Op, case: Case, kernel_device: torch.device) -> None:
    for inputs, tolerance in ((draw(case, kernel_device), 4e-3), (in_float32(draw(case, kernel_device)), 1e-6)):
        for result, expected in zip(tensors(op.run(**inputs)), tensors(op.reference(**inputs)), strict=True):
            assert error(result, expected) < tolerance


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_gradients(op: Op, case: Case, kernel_device: torch.device) -> None:
    inputs = draw(case, kernel_device)
    compare_gradients(op, in_float32(inputs), 2e-6)
    compare_gradients(op, inputs, 1e-2)


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_gradients_without_triton(op: Op, case: Case) -> None:
    with using(True):
        compare_gradients(op, in_float32(draw(case, torch.device("cpu"))), 2e-6)


def tables(device: torch.device, batch: int, rows: int, dim: int) -> Tensor:
    return torch.randn(batch, rows, 3, dim, device=device)


@pytest.mark.parametrize("count", [1, 4, 7, 14])
def test_rows_in_any_order(count: int, kernel_device: torch.device) -> None:
    """14 tokens that choose their modulation row freely; rows that no token chooses get zero gradients."""
    rows = torch.randint(0, count, (14,), device=kernel_device)
    rows[0] = count - 1
    shift, scale, gate = tables(kernel_device, 2, count, 40).unbind(2)
    x, y = torch.randn(2, 2, 14, 40, device=kernel_device)
    inputs = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
    for given in (inputs | {"rows": rows}, inputs | {"rows": rows.int()}, inputs):
        if "rows" not in given and 14 % count:
            continue
        for result, expected in zip(ops.residual_norm(**given), residual_norm.reference(**given), strict=True):
            assert error(result, expected) < 1e-6
        compare_gradients(residual_norm.OP, given, 2e-6)
    plain = {"x": x, "shift": shift, "scale": scale, "rows": rows}
    assert error(ops.adaln(**plain), adaln.reference(**plain)) < 1e-6
    compare_gradients(adaln.OP, plain, 2e-6)
    gated = {"x": x, "y": y, "gate": gate, "rows": rows}
    assert error(ops.gated_residual(**gated), gated_residual.reference(**gated)) < 1e-6


@pytest.mark.parametrize("triton", [True, False])
def test_rows_without_a_table_that_has_rows(triton: bool, request: pytest.FixtureRequest) -> None:
    """An affine norm and no gate: every token has a gradient, whatever row it names."""
    device = request.getfixturevalue("kernel_device") if triton else torch.device("cpu")
    x, y = torch.randn(2, 2, 6, 40, device=device)
    weight, bias = torch.randn(2, 40, device=device)
    rows = torch.tensor([0, 0, 1, 2, 1, 2], device=device)
    with using(True):
        compare_gradients(residual_norm.OP, {"x": x, "y": y, "weight": weight, "bias": bias, "rows": rows}, 2e-6)


def test_tables_broadcast(kernel_device: torch.device) -> None:
    """One table for all samples, one row for all tokens, beside a table that has more of either."""
    shift = torch.randn(1, 1, 40, device=kernel_device)
    scale = torch.randn(1, 3, 40, device=kernel_device)
    gate = torch.randn(2, 1, 40, device=kernel_device)
    x, y = torch.randn(2, 2, 6, 40, device=kernel_device)
    inputs = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
    for result, expected in zip(ops.residual_norm(**inputs), residual_norm.reference(**inputs), strict=True):
        assert error(result, expected) < 1e-6
    compare_gradients(residual_norm.OP, inputs, 2e-6)


def test_any_strides(kernel_device: torch.device) -> None:
    x = torch.randn(6, 2, 300, device=kernel_device).transpose(0, 1)  # [2, 6, 300], batch inside tokens
    y = torch.randn(2, 300, 6, device=kernel_device).transpose(1, 2)  # channels not dense
    shift, scale, gate = tables(kernel_device, 2, 3, 300).unbind(2)
    mask = torch.rand(6, 1, device=kernel_device).T
    for result, expected in zip(
        (*ops.residual_norm(x, y, gate, shift, scale), ops.gated_residual(x, y, gate), ops.audio_residual(x, y, mask)),
        (
            *residual_norm.reference(x, y, gate, shift, scale),
            gated_residual.reference(x, y, gate),
            audio_residual.reference(x, y, mask),
        ),
        strict=True,
    ):
        assert error(result, expected) < 1e-6
    compare_gradients(residual_norm.OP, {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}, 2e-6)


def test_rows_of_any_stride(kernel_device: torch.device) -> None:
    x, y = torch.randn(2, 2, 6, 40, device=kernel_device)
    shift, scale, gate = tables(kernel_device, 2, 3, 40).unbind(2)
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1], device=kernel_device)[::2]
    for module, given in (
        (adaln, (x, shift, scale, rows)),
        (gated_residual, (x, y, gate, rows)),
        (residual_norm, (x, y, gate, shift, scale, None, None, rows)),
    ):
        for result, expected in zip(tensors(module.OP.run(*given)), tensors(module.reference(*given)), strict=True):
            assert error(result, expected) < 1e-6


def bits_that_differ(result: Tensor, expected: Tensor) -> float:
    assert result.dtype == expected.dtype
    return (result != expected).float().mean().item()


def test_rounding_points_of_the_block(kernel_device: torch.device) -> None:
    """The seams of a LiveAvatar block in bf16, written as its graph writes them, round in the same places.

    A last bit may differ where a float32 sum fell on a tie; a wrong rounding point changes a third of all values.
    """
    half, full = torch.bfloat16, torch.float32
    x, y = torch.randn(2, 1, 6, 512, device=kernel_device).to(half)
    shift, scale, gate = tables(kernel_device, 1, 3, 512).unbind(2)
    weight, bias = torch.randn(2, 512, device=kernel_device).to(half)

    def check(result: tuple[Tensor, Tensor], stream: Tensor, h: Tensor) -> None:
        # a GPU adds the gated product unrounded: float32 streams differ in the last bit, others by the rule above
        if stream.dtype == full:
            torch.testing.assert_close(result[0], stream, rtol=1e-6, atol=1e-6)
        else:
            assert bits_that_differ(result[0], stream) < 0.01
        assert bits_that_differ(result[1], h) < 0.01

    with using(False):
        start = ops.adaln(x, shift, scale, out_dtype=half)
        x1 = ops.gated_residual(x, y, gate)
        norm3 = ops.layer_norm(x1.to(half), weight, bias)
        x2 = x1 + y
        norm2 = ops.adaln(x2, shift, scale, out_dtype=half)
        x3 = ops.gated_residual(x2, y, gate).to(half)
        after = ops.adaln(x3, shift, scale, out_dtype=half)
        audio = ops.adaln(x3.float(), shift.to(half), scale.to(half), eps=1e-5).to(half)
        x4 = ops.audio_residual(x3, y)
        last = ops.adaln(x4, shift, scale, out_dtype=half)
        # Wan 2.1 as a module: every tensor bf16, product and sum round
        module = ops.gated_residual(x, y, gate.to(half))
        modulated = ops.adaln(module, shift.to(half), scale.to(half))
    assert bits_that_differ(ops.adaln(x, shift, scale, out_dtype=half), start) < 0.01
    check(ops.residual_norm(x, y, gate, weight=weight, bias=bias, norm_dtype=half), x1, norm3)
    check(ops.residual_norm(x1, y, None, shift, scale, out_dtype=half), x2, norm2)
    check(ops.residual_norm(x2, y, gate, shift, scale, stream_dtype=half, out_dtype=half), x3, after)
    coarse = shift.to(half), scale.to(half)
    check(
        ops.residual_norm(x2, y, gate, *coarse, eps=1e-5, stream_dtype=half, norm_dtype=full, out_dtype=half), x3, audio
    )
    check(ops.residual_norm(x3, y, None, shift, scale, out_dtype=half), x4, last)
    check(ops.residual_norm(x, y, gate.to(half), *coarse), module, modulated)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_token(bad: float, kernel_device: torch.device) -> None:
    x, y = torch.randn(2, 1, 5, 300, device=kernel_device)
    shift, scale, gate = tables(kernel_device, 1, 1, 300).unbind(2)
    y[0, 2, 7] = bad
    stream, h = ops.residual_norm(x, y, gate, shift, scale)
    assert torch.equal(stream.isfinite(), y.isfinite())
    assert h[:, 2].isnan().all() and h[:, [0, 1, 3, 4]].isfinite().all()
    h = ops.adaln(y, shift, scale)
    assert h[:, 2].isnan().all() and h[:, [0, 1, 3, 4]].isfinite().all()
    assert torch.equal(ops.gated_residual(x, y, gate).isfinite(), y.isfinite())
    assert torch.equal(ops.audio_residual(x, y).isfinite(), y.isfinite())


def test_a_constant_row_is_only_shifted(kernel_device: torch.device) -> None:
    shift, scale, _ = tables(kernel_device, 1, 1, 300).unbind(2)
    # the mean of equal values may be off by its last bit, and 1 / sqrt(eps) makes a thousand of it
    constant = torch.full((1, 2, 300), 4.0, device=kernel_device)
    assert torch.allclose(ops.adaln(constant, shift, scale), shift, atol=2e-3)


def test_gradients_are_the_same_bytes_each_time(kernel_device: torch.device) -> None:
    x, y = torch.randn(2, 2, 40, 64, device=kernel_device)
    shift, scale, gate = tables(kernel_device, 2, 4, 64).unbind(2)
    rows = torch.randint(0, 4, (40,), device=kernel_device)
    inputs = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "rows": rows}
    first, second = (gradients(ops.residual_norm, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_registration() -> None:
    """Schema, fake tensors and autograd of the registered ops, as PyTorch checks them."""
    x, y = torch.randn(2, 1, 6, 20).requires_grad_().unbind(0)
    shift, scale, gate = tables(torch.device("cpu"), 1, 3, 20).unbind(2)
    kinora = torch.ops.kinora
    wide = torch.float32
    for op, args in (
        (kinora.adaln, (x, shift, scale, None, 1e-6, None)),
        (kinora.adaln_fp8, (x.detach(), shift, scale, None, 1e-6)),
        (kinora.residual_norm, (x, y, gate, shift, scale, None, 1e-6, False, wide, wide, wide)),
        (kinora.residual_norm_fp8, (x.detach(), y.detach(), None, shift, scale, None, 1e-6, False, wide, wide)),
        (kinora.gated_residual, (x, y, gate, None)),
        (kinora.audio_residual, (x, y, torch.rand(1, 6))),
    ):
        torch.library.opcheck(op.default, args)


def test_layer_norm_and_linear_are_one_node_with_gradients() -> None:
    x = torch.randn(5, 2, 20).transpose(0, 1).requires_grad_()
    weight, bias = torch.randn(20).requires_grad_(), torch.randn(20).requires_grad_()
    torch.library.opcheck(torch.ops.kinora.layer_norm.default, (x, weight, bias, 1e-6))
    torch.library.opcheck(torch.ops.kinora.layer_norm.default, (x, None, None, 1e-6))
    matrix = torch.randn(8, 20).requires_grad_()
    torch.library.opcheck(torch.ops.kinora.linear.default, (x, matrix, None))
    for run, given in ((ops.layer_norm, (x, weight, bias)), (ops.linear, (x, matrix, bias[:8]))):
        plain = torch.autograd.grad(run(*given).square().sum(), given)
        with using(True):
            registered = torch.autograd.grad(run(*given).square().sum(), given)
        for found, wanted in zip(registered, plain, strict=True):
            torch.testing.assert_close(found, wanted)


def test_errors(kernel_device: torch.device) -> None:
    x = torch.randn(2, 6, 20, device=kernel_device)
    one = torch.randn(2, 1, 20, device=kernel_device)
    four = torch.randn(2, 4, 20, device=kernel_device)
    weight = torch.randn(20, device=kernel_device)
    with pytest.raises(ValueError, match="4 modulation rows do not divide 6 tokens; pass `rows`"):
        ops.adaln(x, four, four)
    with pytest.raises(ValueError, match=r"rows has shape \(5,\); one entry per token is needed: \(6,\)"):
        ops.adaln(x, four, four, torch.zeros(5, dtype=torch.long, device=kernel_device))
    with pytest.raises(ValueError, match=r"shift has shape \(2, 1, 19\)"):
        ops.adaln(x, one[..., :19], one)
    with pytest.raises(ValueError, match=r"x has shape .* tokens, channels"):
        ops.adaln(x[0], one, one)
    with pytest.raises(TypeError, match="float64 is not supported"):
        ops.adaln(x.double(), one, one)
    with pytest.raises(ValueError, match="they must be alike"):
        ops.residual_norm(x, x[:, :5], None, one, one)
    with pytest.raises(ValueError, match="they must be alike"):
        ops.gated_residual(x, x[:, :5], one)
    with pytest.raises(ValueError, match="give shift and scale"):
        ops.residual_norm(x, x, one)
    with pytest.raises(ValueError, match="and not both"):
        ops.residual_norm(x, x, one, one, one, weight, weight)
    with pytest.raises(ValueError, match=r"weight \(19,\) and bias \(20,\) must be \[20\]"):
        ops.residual_norm(x, x, one, weight=weight[:19], bias=weight)
    with pytest.raises(ValueError, match="4 residuals for 2 samples and 1 masks"):
        ops.audio_residual(x, torch.cat((x, x)))
    with pytest.raises(ValueError, match="do not fit x"):
        ops.audio_residual(x, x[:, :5])


@pytest.mark.parametrize("op", rowwise.GRADIENTS, ids=lambda op: op.name)
def test_the_benchmark_checks_values_and_gradients(
    op: Op, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowwise, "DEVICE", kernel_device)
    case = next(case for case in op.cases() if case.small)
    error, right = rowwise.check(op, case)
    assert right and error <= case.tolerance
    monkeypatch.setattr(rowwise, "gradients", lambda run, given: {"x": given["x"] * (1 if run is op.run else 2)})
    assert not rowwise.check(op, case)[1]
