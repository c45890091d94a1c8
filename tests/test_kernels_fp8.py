"""FP8 ops: quantisation bit by bit, its fusions with the norms, and the scaled product."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from kinora.bench.harness.check import poisoned
from kinora.kernels import adaln, fp8_linear, fp8_matmul, ops, quantize_rows, residual_norm
from kinora.kernels.cases import Case, Op
from kinora.kernels.dispatch import using
from kinora.kernels.fp8_gemm import GemmTile, fp8_gemm
from kinora.kernels.quantize_rows import Granularity
from torch import Tensor

OPS = (
    adaln.FP8_OP,
    residual_norm.FP8_OP,
    quantize_rows.OP,
    quantize_rows.GELU_OP,
    fp8_matmul.OP,
    fp8_linear.OP,
)
SMALL = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases() if case.small]
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def values(x8: Tensor, descale: Tensor) -> Tensor:
    return x8.float() * descale


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_values(op: Op, case: Case, kernel_device: torch.device) -> None:
    inputs = case.inputs(kernel_device, torch.Generator().manual_seed(0))
    result, expected = op.run(**inputs), op.reference(**inputs)
    if isinstance(result, Tensor):
        result, expected = (result,), (expected,)
    for r, e in zip(result, expected, strict=True):
        assert r.dtype == e.dtype and r.shape == e.shape and r.is_contiguous()
        assert (r.double() - e.double()).norm() <= case.tolerance * e.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16])
@pytest.mark.parametrize("dim", [1, 100, 256, 300, 2000])
def test_rows_quantise_to_the_same_bits(dim: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    x = (torch.randn(6, dim) * torch.logspace(-3, 3, 6)[:, None]).to(kernel_device, dtype)
    x[3] = 0
    for view in (x, x[::2], x.T.contiguous().T):
        x8, descale = ops.quantize_rows(view)
        expected8, expected = quantize_rows.reference(view)
        assert torch.equal(x8.view(torch.uint8), expected8.view(torch.uint8))
        assert torch.equal(descale, expected)
    assert not x8.float()[3 if len(x8) > 3 else 1].isnan().any() and descale.isfinite().all()


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_a_single_row_without_other_axes(granularity: Granularity, registered: bool) -> None:
    x, (weight8, descale) = torch.randn(64), ops.quantize_fp8(torch.randn(32, 64), granularity)
    with using(registered):
        found = ops.fp8_linear(x, weight8, descale, None, granularity)
        assert torch.equal(found, ops.fp8_linear(x[None], weight8, descale, None, granularity)[0])


def test_gelu_rounds_before_it_is_quantised(kernel_device: torch.device) -> None:
    x = torch.randn(4, 300).to(kernel_device, HALF) * 3
    x8, descale = ops.gelu_quantize_rows(x)
    expected8, expected = ops.quantize_rows(F.gelu(x, approximate="tanh"))
    assert torch.allclose(descale, expected, rtol=1e-2)
    assert (x8.float() != expected8.float()).float().mean() < 0.02  # a last bit of bf16 on either side of a tie
    large = torch.tensor([[-1e4, 0.0, 1e4]], device=kernel_device)
    assert torch.allclose(values(*ops.gelu_quantize_rows(large)), large.clamp(min=0))


def test_norms_quantise_what_they_would_have_returned(kernel_device: torch.device) -> None:
    x, y = torch.randn(2, 2, 6, 300).to(kernel_device, HALF)
    shift, scale, gate = torch.randn(2, 3, 3, 300).to(kernel_device).unbind(2)
    weight, bias = torch.randn(2, 300).to(kernel_device)
    expected = ops.quantize_rows(ops.adaln(x, shift, scale, out_dtype=HALF))
    pairs = [(ops.adaln_fp8(x, shift, scale), expected)]
    for norm in ({"shift": shift, "scale": scale}, {"weight": weight, "bias": bias, "norm_dtype": HALF}):
        stream, h = ops.residual_norm(x, y, gate, out_dtype=HALF, **norm)
        stream8, *result = ops.residual_norm_fp8(x, y, gate, **norm)
        assert torch.equal(stream, stream8)
        pairs.append((tuple(result), ops.quantize_rows(h)))
    for result, expected in pairs:
        assert all(torch.equal(r.float(), e.float()) for r, e in zip(result, expected, strict=True))


def test_what_is_not_finite_stays_in_its_row(kernel_device: torch.device) -> None:
    x = torch.randn(5, 300, device=kernel_device)
    x[1, 7], x[3, 299] = float("nan"), float("inf")
    weight8, weight_descale = quantize_rows.quantize_fp8(torch.randn(16, 300, device=kernel_device)[:, :288], "row")
    for result, expected in (
        (ops.quantize_rows(x), quantize_rows.reference(x)),
        (ops.gelu_quantize_rows(x), quantize_rows.gelu_reference(x)),
    ):
        for r, e in zip(result, expected, strict=True):
            assert torch.equal(r.float().isnan(), e.float().isnan())
        descale = result[1][:, 0]
        assert descale[1].isnan() and descale[3].isinf() and descale[[0, 2, 4]].isfinite().all()
        y = ops.fp8_matmul(result[0][:, 12:].contiguous(), result[1], weight8, weight_descale)
        assert y[[1, 3]].isnan().all() and y[[0, 2, 4]].isfinite().all()
    shift, scale = torch.zeros(2, 1, 1, 300, device=kernel_device)
    x8, descale = ops.adaln_fp8(x[None], shift, scale)
    assert x8.float()[0, [1, 3]].isnan().all() and x8.float()[0, [0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_linear_is_its_pieces(granularity: fp8_linear.Granularity, kernel_device: torch.device) -> None:
    x, bias = torch.randn(3, 5, 64).to(kernel_device, HALF), torch.randn(48).to(kernel_device, HALF)
    weight8, weight_descale = ops.quantize_fp8(torch.randn(48, 64, device=kernel_device), granularity)
    y = ops.fp8_linear(x, weight8, weight_descale, bias, granularity)
    x8, descale = ops.quantize_fp8(x, granularity)
    exact = values(x8, descale).double() @ values(weight8, weight_descale).double().T + bias.double()
    assert y.dtype == HALF and y.shape == (3, 5, 48)
    assert (y.double() - exact).norm() < 3e-3 * exact.norm()
    assert ops.fp8_linear(x.float(), weight8, weight_descale, None, granularity).dtype == torch.float32


def test_registration() -> None:
    """Schema, fake tensors and dispatch of the registered ops, as PyTorch checks them; one node each in a graph."""
    x = torch.randn(2, 5, 32)
    x8, descale = ops.quantize_rows(x)
    weight8, weight_descale = ops.quantize_fp8(torch.randn(16, 32), "row")
    kinora = torch.ops.kinora
    torch.library.opcheck(kinora.quantize_rows.default, (x,))
    torch.library.opcheck(kinora.gelu_quantize_rows.default, (x,))
    arguments = x8, descale, weight8, weight_descale, torch.randn(16), HALF, True
    can = ("test_autograd_registration", "test_faketensor")  # PyTorch's schema test multiplies, which FP8 cannot
    torch.library.opcheck(kinora.fp8_matmul.default, arguments, test_utils=can)
    with using(True):
        graph = torch.export.export(Linear(), (x, weight8, weight_descale)).graph
    assert [str(node.target) for node in graph.nodes if "kinora" in str(node.target)] == [
        "kinora.quantize_rows.default",
        "kinora.fp8_matmul.default",
    ]


class Linear(torch.nn.Module):
    def forward(self, x: Tensor, weight8: Tensor, weight_descale: Tensor) -> Tensor:
        return ops.fp8_linear(x, weight8, weight_descale, None, "row")


def test_not_differentiable(kernel_device: torch.device) -> None:
    x = torch.randn(2, 32, device=kernel_device, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        ops.quantize_rows(x)[1].sum().backward()


def test_errors(kernel_device: torch.device) -> None:
    x8, descale = ops.quantize_rows(torch.randn(5, 32, device=kernel_device))
    weight8, weight_descale = ops.quantize_fp8(torch.randn(16, 32, device=kernel_device), "row")
    with pytest.raises(TypeError, match="both must be float8_e4m3fn"):
        ops.fp8_matmul(x8.float(), descale, weight8, weight_descale)
    with pytest.raises(ValueError, match="do not fit together"):
        ops.fp8_matmul(x8[:, :16], descale, weight8, weight_descale)
    with pytest.raises(ValueError, match=r"one a row each \(5 and 16\), or one each"):
        ops.fp8_matmul(x8, descale[:1], weight8, weight_descale)
    with pytest.raises(TypeError, match="float64 is not supported"):
        ops.quantize_rows(torch.zeros(2, 32, dtype=torch.float64, device=kernel_device))


@pytest.mark.parametrize(("m", "n", "k"), [(15, 48, 64), (40, 80, 208), (1, 16, 32)])
def test_persistent_product(m: int, n: int, k: int, kernel_device: torch.device) -> None:
    x8, descale = ops.quantize_rows(torch.randn(m, k, device=kernel_device))
    weight8, weight_descale = ops.quantize_fp8(torch.randn(n, k, device=kernel_device), "row")
    bias = torch.randn(n, device=kernel_device).to(HALF)
    for b in (bias, None):
        y = fp8_gemm(x8, descale, weight8, weight_descale, b, GemmTile(64, 32, 64, 4, 3, 2))
        expected = fp8_matmul.reference(x8, descale, weight8, weight_descale, b)
        assert (y.float() - expected.float()).norm() < 4e-3 * expected.float().norm()
