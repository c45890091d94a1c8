"""The norm over channels with SiLU: values, gradients, ranks and layouts, NaN, registration, errors."""

import pytest
import torch
import torch.nn.functional as F
from kinora.kernels import channel_norm, ops
from kinora.kernels.cases import Case
from kinora.kernels.dispatch import using
from torch import Tensor

OP = channel_norm.SILU_OP
SMALL = [case for case in OP.cases() if case.small]
every_case = pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])


def draw(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    given = case.inputs(device, torch.Generator().manual_seed(0))
    return given["x"], given["gamma"]


def by_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """The same by another formula, PyTorch's RMS norm over the last axis, in float64."""
    y = F.rms_norm(x.double().movedim(1, -1), x.shape[1:2], gamma.double(), eps=0.0)
    return F.silu(y).movedim(-1, 1)


def gradients(run, x: Tensor, gamma: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, gamma)]
    return torch.autograd.grad((run(*leaves) * weights).sum(), leaves)


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


@every_case
def test_values(case: Case, kernel_device: torch.device) -> None:
    x, gamma = draw(case, kernel_device)
    y = ops.channel_norm_silu(x, gamma)
    assert y.dtype == x.dtype and y.movedim(1, -1).is_contiguous()
    bound = 5e-3 if x.dtype == torch.bfloat16 else 1e-6
    assert relative(y, by_rms_norm(x, gamma)) < bound
    assert relative(y, OP.reference(x, gamma)) < bound
    wide = ops.channel_norm_silu(x, gamma, torch.float32)
    assert wide.dtype == torch.float32 and relative(wide, by_rms_norm(x, gamma)) < 1e-6


@every_case
def test_gradients(case: Case, kernel_device: torch.device) -> None:
    x, gamma = draw(case, kernel_device)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    expected = gradients(by_rms_norm, x.double(), gamma.double(), weights)
    bound = 1e-2 if x.dtype == torch.bfloat16 else 5e-6
    for found, wanted in zip(gradients(ops.channel_norm_silu, x, gamma, weights), expected, strict=True):
        assert found.dtype == x.dtype and relative(found, wanted) < bound


def test_many_pixels_share_out_the_gradient_of_gamma(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer programs than tiles: each walks over several, the last one over a tail."""
    monkeypatch.setattr(channel_norm, "BACKWARD_PROGRAMS", 2)
    x, gamma = torch.randn(1, 1500, 3, 3, device=kernel_device), torch.randn(1500, device=kernel_device)
    weights = torch.randn_like(x)
    expected = gradients(by_rms_norm, x.double(), gamma.double(), weights)
    for found, wanted in zip(gradients(ops.channel_norm_silu, x, gamma, weights), expected, strict=True):
        assert relative(found, wanted) < 5e-6


@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
def test_any_layout(layout: str, kernel_device: torch.device) -> None:
    full = torch.randn(2, 24, 4, 6, 5, device=kernel_device)
    x = {"contiguous": full, "slice": full[:, ::2, 1:, :, :3], "transposed": full.transpose(2, 4)}[layout]
    gamma = torch.randn(2 * x.shape[1], device=kernel_device)[::2]
    assert relative(ops.channel_norm_silu(x, gamma), by_rms_norm(x, gamma)) < 1e-6


def test_frames_beyond_two_to_the_31_elements(kernel_device: torch.device) -> None:
    """Three frames far apart in memory that nobody touches between them."""
    if kernel_device.type == "cuda":
        pytest.skip("a GPU has no memory that takes room only where it is written")
    apart, frames = 2**30, torch.randn(1, 3, 1, 1, 16)
    x = torch.empty(2 * apart + 16, dtype=torch.float16).as_strided(frames.shape, (0, apart, 16, 16, 1))
    x.copy_(frames)
    raw = torch.zeros_like(frames)
    ops.channel_norm(x, raw=raw)
    assert torch.equal(raw, frames.half().float())


def test_not_finite_values_stay_in_their_pixel(kernel_device: torch.device) -> None:
    x = torch.randn(1, 6, 1, 3, 4, device=kernel_device)
    x[0, 2, 0, 1, 1], x[0, 4, 0, 2, 3] = float("nan"), float("inf")
    y = ops.channel_norm_silu(x, torch.ones(6, device=kernel_device))
    expected = OP.reference(x, torch.ones(6, device=kernel_device))
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[0, :, 0, 1, 1].isnan().all() and y[0, 4, 0, 2, 3].isnan()
    assert y.isnan().sum() == 7
    raw, normed = torch.empty(2, 1, 1, 3, 4, 6, device=kernel_device)
    frames = x.movedim(1, -1)
    ops.channel_norm(frames.contiguous(), torch.ones(6, device=kernel_device), raw=raw, normed=normed)
    torch.testing.assert_close(raw, frames, equal_nan=True)
    torch.testing.assert_close(normed, expected.movedim(1, -1), equal_nan=True)


def test_zeros_give_zeros_and_finite_gradients(kernel_device: torch.device) -> None:
    x, gamma = torch.zeros(1, 5, 2, 2, device=kernel_device), torch.ones(5, device=kernel_device)
    assert not ops.channel_norm_silu(x, gamma).any()
    assert all(grad.isfinite().all() for grad in gradients(ops.channel_norm_silu, x, gamma, torch.ones_like(x)))
    nothing = x[:, :, :0]
    assert ops.channel_norm_silu(nothing, gamma).shape == (1, 5, 0, 2)
    assert not gradients(ops.channel_norm_silu, nothing, gamma, nothing)[1].any()


def test_registration() -> None:
    """Schema, fake tensors and autograd as PyTorch checks them; gradients of the registered op without Triton."""
    x, gamma = torch.randn(2, 5, 3, 4).requires_grad_(), torch.randn(5).requires_grad_()
    torch.library.opcheck(torch.ops.kinora.channel_norm_silu.default, (x, gamma, torch.float32))
    weights = torch.randn_like(x)
    plain = gradients(OP.reference, x, gamma, weights)
    with using(True):
        registered = gradients(OP.run, x, gamma, weights)
    for found, wanted in zip(registered, plain, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("registered", [True, False])
def test_errors(registered: bool, kernel_device: torch.device) -> None:
    with using(registered), pytest.raises(ValueError, match=r"gamma \(5,\) for x \(1, 6, 2\): .* one weight a channel"):
        ops.channel_norm_silu(torch.ones(1, 6, 2, device=kernel_device), torch.ones(5, device=kernel_device))
