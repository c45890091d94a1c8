"""The VAE's convolutions and norms: Triton kernels against formulas written another way."""

import pytest
import torch
import torch.nn.functional as F
from kinora.kernels import causal_conv3d, channel_norm, ops, padded_conv3d
from kinora.kernels.cases import Case, Op
from torch import Tensor

SMALL = [(m.OP, case) for m in (padded_conv3d, channel_norm) for case in m.cases() if case.small]


def relative(computed: Tensor, expected: Tensor) -> float:
    return ((computed.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()


CAUSAL = [case for case in causal_conv3d.cases() if case.small]


@pytest.mark.parametrize("case", CAUSAL, ids=[case.name for case in CAUSAL])
def test_causal_convolution_and_its_gradients(case: Case, kernel_device: torch.device) -> None:
    given = dict(case.inputs(kernel_device, torch.Generator().manual_seed(0)))
    live = [t.requires_grad_() for t in given.values() if isinstance(t, Tensor)]
    results = []
    for run in (ops.causal_conv3d, causal_conv3d.reference):
        y = run(**given)
        results.append((y, *torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), live)))
    for computed, expected in zip(*results, strict=True):
        assert computed.shape == expected.shape
        assert relative(computed, expected) < case.tolerance


@pytest.mark.parametrize(("op", "case"), SMALL, ids=[f"{op.name}-{case.name}" for op, case in SMALL])
def test_kernel_equals_reference(op: Op, case: Case, kernel_device: torch.device) -> None:
    given = dict(case.inputs(kernel_device, torch.Generator().manual_seed(0)))
    outputs = [name for name in op.mutates if given[name] is not None]
    for name in outputs:
        given[name].fill_(float("nan"))  # whatever the kernel leaves out shows
    op.run(**given)
    computed = {name: given[name].clone() for name in outputs}
    op.reference(**given)
    for name in outputs:
        assert relative(computed[name], given[name]) < case.tolerance, name
