"""Adapters and FP8 layers: merged equals unmerged, broken files are refused, quantisation error stays small."""

import pytest
import torch
from kinora.checkpoints_tools.lora import merge_lora
from kinora.graphs.models.layers import Linear
from kinora.graphs.quantize import Fp8Linear, quantize_linears
from kinora.kernels import ops
from kinora.kernels.quantize_rows import FP8_MAX
from kinora.train.flow_matching import flow_matching_loss, noise_level, share_within_blocks, training_schedule
from kinora.train.lora import add_lora, lora_state_dict
from torch import Tensor, nn


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = Linear(16, 32)
        self.ffn = nn.Sequential(Linear(32, 16), nn.GELU(), Linear(16, 48))
        self.head = Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ffn(self.q(x)))


def adapted() -> tuple[Toy, dict[str, Tensor]]:
    model = Toy()
    assert add_lora(model, rank=2, alpha=3.0) == ["q", "ffn.0", "ffn.2"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model, {name: value.clone() for name, value in lora_state_dict(model).items()}


@pytest.mark.parametrize("form", ["{}", "base_model.model.{}"])
@pytest.mark.parametrize("default", [".default", ""])
def test_merged_equals_adapted(form: str, default: str) -> None:
    model, lora = adapted()
    plain = Toy()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" not in name})
    file = {form.format(name).replace(".default", default): value for name, value in lora.items()}
    assert merge_lora(plain.state_dict(), file, alpha=3.0) == ["ffn.0", "ffn.2", "q"]
    x = torch.randn(5, 16)
    assert torch.allclose(plain(x), model(x), atol=1e-5)


def test_a_new_adapter_changes_nothing() -> None:
    model, x = Toy(), torch.randn(5, 16)
    before = model(x)
    add_lora(model, rank=4, alpha=4.0)
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="already has an adapter"):
        add_lora(model, rank=4, alpha=4.0)
    with pytest.raises(ValueError, match="no linear layer"):
        add_lora(Toy(), rank=4, alpha=4.0, targets=("absent",))
    with pytest.raises(ValueError, match="at least 1"):
        add_lora(Toy(), rank=0, alpha=4.0)


def test_merge_refuses_broken_files() -> None:
    _, lora = adapted()

    def merge(file: dict[str, Tensor]) -> None:
        plain = Toy()
        before = {name: value.clone() for name, value in plain.state_dict().items()}
        try:
            merge_lora(plain.state_dict(), file, alpha=3.0)
        finally:
            assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())

    with pytest.raises(KeyError, match="have no LoRA tensors: q"):
        merge({name: value for name, value in lora.items() if not name.startswith("q.")})
    with pytest.raises(KeyError, match="not in the model: other"):
        merge(lora | {"other.lora_A.weight": torch.zeros(2, 16)})
    with pytest.raises(KeyError, match="not in the model: scale"):
        merge(lora | {"scale": torch.zeros(1)})
    with pytest.raises(KeyError, match="only one of"):
        merge({name: value for name, value in lora.items() if name != "q.lora_B.default.weight"})
    with pytest.raises(ValueError, match="does not give"):
        merge(lora | {"q.lora_A.default.weight": torch.zeros(2, 15)})


def test_merge_also_loads_plain_parameters() -> None:
    _, lora = adapted()
    plain, bias = Toy(), torch.randn(4)
    merge_lora(plain.state_dict(), lora | {"base_model.model.head.bias": bias}, alpha=3.0)
    assert torch.equal(plain.head.bias, bias)


def test_fp8_scales() -> None:
    small, large = torch.randn(4, 8).clamp(-0.9, 0.9), torch.randn(4, 8) * 100
    bits, descale = ops.quantize_fp8(small)
    assert descale.item() == pytest.approx(1 / 448)  # capped: a small tensor does not use the whole range
    bits, descale = ops.quantize_fp8(large)
    assert bits.float().abs().max() == FP8_MAX and descale.shape == (1,)
    assert descale.item() == pytest.approx(large.abs().max().item() / FP8_MAX)
    bits, descale = ops.quantize_fp8(small, "row")
    assert descale.shape == (4, 1) and bool((bits.float().abs().amax(-1) == FP8_MAX).all())
    zero, descale = ops.quantize_fp8(torch.zeros(2, 4), "row")
    assert not zero.float().any() and descale.isfinite().all()
    with pytest.raises(ValueError, match="granularity"):
        ops.quantize_fp8(small, "block")  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_fp8_layer_is_close(granularity) -> None:
    """The published recipe answers in the dtype of its input, a row-wise layer in that of the layer it replaces."""
    linear = Linear(64, 48).to(torch.bfloat16)
    layer = Fp8Linear(linear, granularity)
    x = torch.randn(3, 5, 64)
    for dtype in (torch.float32, torch.bfloat16):
        y, exact = layer(x.to(dtype)), linear(x)
        assert y.dtype == (dtype if granularity == "tensor" else torch.bfloat16) and y.shape == exact.shape
        assert (y.float() - exact.float()).norm() < 0.06 * exact.float().norm()


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_values_has_the_same_tensors(
    granularity: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes, dtypes and names of a real one, without quantising anything."""
    made = Fp8Linear(torch.nn.Linear(48, 32, dtype=dtype), granularity)
    monkeypatch.setattr("kinora.graphs.quantize.ops.quantize_fp8", None)
    empty = Fp8Linear(torch.nn.Linear(48, 32, dtype=dtype, device="meta"), granularity)
    assert all(value.is_meta for value in empty.state_dict().values()) and empty.dtype == made.dtype

    def described(layer: Fp8Linear) -> dict[str, tuple]:
        return {name: (v.dtype, v.shape, v.stride()) for name, v in layer.state_dict().items()}

    assert described(empty) == described(made)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="granularity"):
        Fp8Linear(torch.nn.Linear(48, 32, device="meta"), "column")  # type: ignore[arg-type]


def test_row_scales_survive_an_outlier_row() -> None:
    x = torch.randn(8, 64) * torch.logspace(-4, 2, 8)[:, None]
    linear = Linear(64, 32, bias=False)
    exact = linear(x)

    def errors(granularity) -> Tensor:
        y = Fp8Linear(linear, granularity)(x)
        return (y - exact).norm(dim=-1) / exact.norm(dim=-1)

    assert errors("row").max() < 0.06 < errors("tensor").max()


def test_quantize_linears_leaves_the_ignored_and_what_fp8_does_not_multiply() -> None:
    model = Toy()
    assert quantize_linears(model, ignore=("ffn.0",)) == ["q", "ffn.2"]
    assert isinstance(model.ffn[0], Linear) and isinstance(model.ffn[2], Fp8Linear)
    assert isinstance(model.head, Linear), "four channels"
    with pytest.raises(ValueError, match="multiples of 16, or all match ignore"):
        quantize_linears(model, ignore=("ffn.0",))


def test_audio_residual_sums_actors() -> None:
    x, residual, mask = torch.randn(2, 6, 4), torch.randn(6, 6, 4), torch.rand(3, 6)
    y = ops.audio_residual(x, residual, mask)
    expected = x + sum(residual[a::3] * mask[a][None, :, None] for a in range(3))
    assert torch.allclose(y, expected, atol=1e-6)
    with pytest.raises(ValueError, match="6 residuals for 2 samples and 1 masks"):
        ops.audio_residual(x, residual)


def test_training_noise_levels() -> None:
    schedule = training_schedule()
    t = share_within_blocks(torch.tensor([[900.0, 1.0, 2.0, 100.0, 3.0, 4.0]]), 3)
    assert t.tolist() == [[900.0] * 3 + [100.0] * 3]
    sigma, weight = noise_level(schedule, t)
    assert torch.allclose(sigma, t / 1000, atol=3e-3) and bool((weight >= 0).all())
    with pytest.raises(ValueError, match="whole blocks"):
        share_within_blocks(torch.zeros(1, 4), 3)
    x0, noise = torch.randn(2, 1, 4, 2, 3, 3)
    assert flow_matching_loss(noise - x0, x0, noise, torch.ones(1, 2)) == 0
    assert flow_matching_loss(noise - x0 + 2, x0, noise, torch.ones(1, 2)) == pytest.approx(4.0, rel=1e-5)
