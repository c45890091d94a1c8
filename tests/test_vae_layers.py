"""What the Wan VAE is made of: sizes, read from weights and refused, and its layers by themselves."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.models.wan_vae import WAN21_VAE, VaeConfig, WanVae, infer_config
from kinora.graphs.models.wan_vae_blocks import ChannelRmsNorm
from kinora.kernels import causal_conv3d, ops
from small_vae import TINY, assert_same


def test_published_sizes() -> None:
    with torch.device("meta"):
        state = WanVae(WAN21_VAE).state_dict()
    assert len(state) == 194
    assert sum(value.numel() for value in state.values()) == 126_892_531
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["conv1.weight"] == (32, 32, 1, 1, 1)
    assert shapes["encoder.downsamples.3.shortcut.weight"] == (192, 96, 1, 1, 1)
    assert shapes["encoder.downsamples.8.time_conv.weight"] == (384, 384, 3, 1, 1)
    assert shapes["decoder.middle.1.to_qkv.weight"] == (1152, 384, 1, 1)
    assert shapes["decoder.upsamples.3.time_conv.weight"] == (768, 384, 3, 1, 1)
    assert shapes["decoder.upsamples.11.resample.1.weight"] == (96, 192, 3, 3)
    assert shapes["decoder.head.0.gamma"] == (96, 1, 1, 1)
    assert infer_config(state) == WAN21_VAE


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, num_res_blocks=2),
        replace(TINY, dim_mult=(1, 2), temporal_downsample=(True,)),
        replace(TINY, dim_mult=(2, 2, 1), temporal_downsample=(False, False)),
        replace(TINY, dim_mult=(2,), temporal_downsample=()),
    ],
)
def test_sizes_are_read_from_weights(config: VaeConfig) -> None:
    state = WanVae(config).state_dict()
    assert infer_config(state, config.latent_mean, config.latent_std) == config


def test_weights_of_something_else_are_refused() -> None:
    with pytest.raises(KeyError):
        infer_config({"blocks.0.weight": torch.zeros(1)}, (), ())


def test_wrong_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="3 transitions"):
        replace(TINY, temporal_downsample=(True,))
    with pytest.raises(ValueError, match="each of the 4 latent channels"):
        replace(TINY, z_dim=4)
    with pytest.raises(ValueError, match="positive"):
        replace(TINY, latent_std=(1.0, 0.0, 1.0))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_causal_convolution_equals_conv3d(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kernel = (data.draw(st.sampled_from([1, 3])), *(data.draw(st.sampled_from([1, 3])) for _ in range(2)))
    padding, stride = tuple(k // 2 for k in kernel), (1, draw(1, 2), draw(1, 2))
    torch.manual_seed(draw(0, 99))
    x = torch.randn(draw(1, 2), draw(1, 3), draw(1, 4), draw(3, 6), draw(3, 6))
    weight = torch.randn(draw(1, 4), x.shape[1], *kernel)
    bias = torch.randn(weight.shape[0])
    known = draw(0, 2 * padding[0])
    history = torch.randn(x.shape[0], x.shape[1], known, *x.shape[3:]) if known else None
    computed = ops.causal_conv3d(x, weight, bias, history, stride, padding)
    assert_same(computed, causal_conv3d.reference(x, weight, bias, history, stride, padding))


def test_history_is_the_last_frames_with_zeros_before_the_start() -> None:
    x = torch.arange(1.0, 4.0).view(1, 1, 3, 1, 1)
    frames = [ops.next_history(x[:, :, :n], None).flatten().tolist() for n in (1, 2, 3)]
    assert frames == [[0, 1], [1, 2], [2, 3]]
    assert ops.next_history(x[:, :, :1], x[:, :, 1:]).flatten().tolist() == [3, 1]
    with pytest.raises(ValueError, match="looks back 2"):
        ops.causal_conv3d(x, torch.ones(1, 1, 3, 1, 1), torch.zeros(1), x, padding=(1, 0, 0))


def test_norm_of_zero_and_tiny_channels() -> None:
    norm = ChannelRmsNorm(4)
    x = torch.zeros(1, 4, 1, 1, 2)
    x[..., 1] = 1e-13
    x.requires_grad_()
    y = norm(x)
    torch.testing.assert_close(y[..., 0], torch.zeros_like(y[..., 0]))
    torch.testing.assert_close(y[..., 1], torch.full_like(y[..., 1], 0.2))  # 1e-13 / 1e-12 * sqrt(4)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_half_precision_convolution_rounds_twice() -> None:
    x = torch.full((1, 1, 1, 1, 1), 1 + 3 * 2**-7).bfloat16()
    weight, bias = torch.full_like(x, 1 + 17 * 2**-7), torch.tensor([2.0**-9]).bfloat16()
    product = float(x) * float(weight)  # 0.4 units of the last place above a bf16 number, the bias adds 0.25
    once, twice = torch.tensor(product + float(bias)).bfloat16(), torch.tensor(product).bfloat16() + bias
    assert once != twice
    assert ops.causal_conv3d(x, weight, bias, padding=(0, 0, 0)).flatten() == twice
