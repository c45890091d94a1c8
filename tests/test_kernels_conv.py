"""The VAE's convolutions and norms: Triton kernels against formulas written another way."""

import pytest
import torch
import torch.nn.functional as F
from kinora.kernels import causal_conv3d, channel_norm, conv3d_triton, gather_taps, ops, padded_conv3d
from kinora.kernels.cases import Case, Op
from kinora.kernels.conv3d_triton import Tile
from torch import Tensor

SMALL = [(m.OP, case) for m in (padded_conv3d, channel_norm, gather_taps) for case in m.cases() if case.small]


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
        results.append(
            (
                y,
                *torch.autograd.grad(
                    (y * torch.linspace(-1, 2, y.numel(), device=kernel_device).view_as(y)).sum(), live
                ),
            )
        )
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


@pytest.mark.parametrize(
    "tile", [Tile(32, 16, 0, 16, 4, 2), Tile(16, 16, 16, 32, 4, 2), Tile(64, 32, 0, 16, 4, 2)], ids=repr
)
def test_every_tiling_gives_the_same(tile: Tile, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of output channels with the norm behind, two accumulators, and one block that holds everything."""
    monkeypatch.setitem(conv3d_triton.MEASURED, (32, 24, (3, 3, 3), False), tile)
    case = padded_conv3d._case("tiled", (32, 24), 2, (3, 5), small=True)
    given = dict(case.inputs(kernel_device, torch.Generator().manual_seed(1)))
    given["raw"] = None
    padded_conv3d.padded_conv3d(**given)
    computed = given["normed"].clone()
    padded_conv3d.reference(**given)
    assert relative(computed, given["normed"]) < 1e-5


def test_library_candidate(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv3d_triton, "tile_for", lambda *_: None)
    for case in padded_conv3d.cases():
        if case.small:
            given = dict(case.inputs(kernel_device, torch.Generator().manual_seed(1)))
            padded_conv3d.padded_conv3d(**given)
            computed = given["raw"].clone()
            padded_conv3d.reference(**given)
            assert relative(computed, given["raw"]) < 1e-5


def test_sum_may_overwrite_its_residual(kernel_device: torch.device) -> None:
    case = next(case for case in padded_conv3d.cases() if case.name == "small")
    given = dict(case.inputs(kernel_device, torch.Generator().manual_seed(2)))
    padded_conv3d.reference(**given)
    stream = given["residual"].clone()
    padded_conv3d.padded_conv3d(**{**given, "residual": stream, "raw": stream})
    assert relative(stream, given["raw"]) < 1e-5


def test_small_tensors_of_any_stride(kernel_device: torch.device) -> None:
    """Every second entry of a longer vector, as a weight that was cut out of a larger one."""

    def apart(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, 1e3)), -1)[..., 0]

    vectors = {
        padded_conv3d: ("bias", "gamma"),
        channel_norm: ("gamma",),
        gather_taps: ("bias", "partial"),
        causal_conv3d: ("bias",),
    }
    for module, names in vectors.items():
        case = next(case for case in module.cases() if case.name == "small")
        given = dict(case.inputs(kernel_device, torch.Generator().manual_seed(6)))
        outputs = list(module.OP.mutates)
        wanted = module.OP.run(**given)
        expected = [given[name].clone() for name in outputs] if outputs else [wanted]
        found = module.OP.run(**given | {name: apart(given[name]) for name in names})
        for result, plain in zip([given[name] for name in outputs] or [found], expected, strict=True):
            assert torch.equal(result, plain), module.OP.name


def test_upsampling_equals_nearest_then_convolution(kernel_device: torch.device) -> None:
    x, weight, bias = torch.randn(1, 16, 2, 3, 5), torch.randn(8, 16, 3, 3), torch.randn(8)
    large = F.interpolate(x[0].transpose(0, 1), scale_factor=2.0, mode="nearest-exact")
    expected = F.conv2d(large, weight, bias, padding=1).permute(0, 2, 3, 1)[None]
    buffer = padded_conv3d.ringed(1, 2, 3, 5, 16, like=x.to(kernel_device))
    padded_conv3d.inner(buffer).copy_(x.permute(0, 2, 3, 4, 1))
    out = torch.full(expected.shape, float("nan"), device=kernel_device)
    packed = padded_conv3d.pack_upsampled(weight).to(kernel_device)
    padded_conv3d.padded_conv3d(buffer, packed, bias.to(kernel_device), raw=out)
    assert relative(out.cpu(), expected) < 1e-5


def test_head_by_taps_equals_convolution(kernel_device: torch.device) -> None:
    x, weight, bias = torch.randn(1, 16, 4, 3, 5), torch.randn(3, 16, 3, 3, 3) * 0.05, torch.randn(3)
    expected = F.conv3d(x, weight, bias, padding=(0, 1, 1)).clamp(-1, 1)
    buffer = padded_conv3d.ringed(1, 4, 3, 5, 16, like=x.to(kernel_device))
    padded_conv3d.inner(buffer).copy_(x.permute(0, 2, 3, 4, 1))
    partial = padded_conv3d.ringed(1, 2, 3, 5, 27, like=buffer)
    taps = padded_conv3d.pack_weight(gather_taps.tap_weight(weight)).to(kernel_device)
    zeros = torch.zeros(27, device=kernel_device)
    padded_conv3d.padded_conv3d(buffer, taps, zeros, raw=padded_conv3d.inner(partial))
    out = torch.empty(expected.shape, device=kernel_device)
    gather_taps.gather_taps(partial, bias.to(kernel_device), out, 1.0)
    assert relative(out.cpu(), expected) < 1e-5


def test_nan_stays_in_the_windows_that_hold_it(kernel_device: torch.device) -> None:
    case = next(case for case in causal_conv3d.cases() if case.name == "small")
    given = dict(case.inputs(kernel_device, torch.Generator().manual_seed(3)))
    given["x"][0, 2, 1, 0, 1] = float("nan")
    y = ops.causal_conv3d(**given)
    holds = torch.zeros_like(y, dtype=torch.bool)
    holds[0, :, 1:, :2, :3] = True  # frames 1 ... 3, rows 0 and 1, columns 0 ... 2
    assert torch.equal(y.isnan(), holds)
    x = torch.ones(1, 1, 1, 3, 4, device=kernel_device)
    x[..., 1, 2] = float("inf")
    raw, normed = torch.empty_like(x), torch.empty_like(x)
    channel_norm.channel_norm(x, torch.ones(4, device=kernel_device), raw=raw, normed=normed)
    assert torch.equal(raw, x)
    assert normed[..., 1, 2].isnan().all() and normed[..., [0, 2], :].isfinite().all()


def test_bf16_rounds_once(kernel_device: torch.device) -> None:
    case = next(case for case in causal_conv3d.cases() if case.name == "small")
    given = dict(case.inputs(kernel_device, torch.Generator().manual_seed(4)))
    expected = causal_conv3d.reference(**given)
    half = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in given.items()}
    y = ops.causal_conv3d(**half)
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 1e-2


def test_the_registered_op_keeps_torch_s_rules() -> None:
    for case in causal_conv3d.cases():
        if case.small:
            given = case.inputs(torch.device("cpu"), torch.Generator().manual_seed(5))
            arguments = (*list(given.values())[:4], list(given["stride"]), list(given["padding"]))
            torch.library.opcheck(causal_conv3d._op, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 2, 9, 16)}, r"\[batch, frames, rows \+ 2"),
        ({"x": torch.zeros(2, 4, 7, 16, 9).transpose(3, 4)}, "follow each other in memory"),
        ({"weight": torch.zeros(2, 24, 3, 3, 3, 16)}, "pack_weight or pack_upsampled"),
        ({"weight": torch.zeros(1, 24, 3, 5, 5, 16)}, "5x5"),
        ({"bias": torch.zeros(5)}, r"\(24,\) is needed"),
        ({"weight": torch.zeros(1, 24, 3, 3, 3, 16).bfloat16()}, "float32 like x"),
        ({"x": torch.zeros(2, 2, 7, 9, 16)}, "do not go together"),
        ({"residual": torch.zeros(2, 2, 5, 7, 8)}, "residual has shape"),
        ({"raw": None, "normed": None}, "nothing to write"),
        ({"gamma": None}, "normed needs gamma"),
        ({"frame_split": 2, "raw": torch.zeros(2, 4, 5, 7, 12)}, "shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    case = next(case for case in padded_conv3d.cases() if case.name == "small")
    given = {**case.inputs(torch.device("cpu"), torch.Generator()), **change}
    with pytest.raises(ValueError, match=message):
        padded_conv3d.padded_conv3d(**given)
