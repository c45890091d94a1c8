"""The VAE's convolutions and norms: Triton kernels against formulas written another way."""

import pytest
import torch
import torch.nn.functional as F
from kinora.kernels import channel_norm, padded_conv3d
from kinora.kernels.cases import Case, Op
from torch import Tensor

SMALL = [(m.OP, case) for m in (padded_conv3d, channel_norm) for case in m.cases() if case.small]


def relative(computed: Tensor, expected: Tensor) -> float:
    return ((computed.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()


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
