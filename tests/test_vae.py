"""The Wan VAE: streams cut anywhere equal whole clips, tiles, shapes, errors, training."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.models.wan_vae import (
    BF16,
    BF16_AUTOCAST,
    BF16_MODULE,
    FLOAT32,
    WAN21_VAE,
    DecoderState,
    EncoderState,
    VaeConfig,
    VaePrecision,
    WanVae,
    infer_config,
)
from kinora.graphs.models.wan_vae_blocks import ChannelRmsNorm
from kinora.graphs.models.wan_vae_tiled import decode_tiled, encode_tiled, ramp, tile_starts
from kinora.kernels import causal_conv3d, ops
from torch import Tensor

TINY = VaeConfig(
    dim=4,
    z_dim=3,
    dim_mult=(1, 2, 3, 4),
    num_res_blocks=1,
    temporal_downsample=(False, True, True),
    latent_mean=(0.1, -0.2, 0.3),
    latent_std=(1.5, 0.5, 2.0),
)


def make_vae(config: VaeConfig = TINY, seed: int = 0) -> WanVae:
    """Random weights with lively latents, norms included."""
    torch.manual_seed(seed)
    vae = WanVae(config)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return vae.eval().requires_grad_(False)


def assert_same(computed: Tensor, expected: Tensor) -> None:
    """Equal but for float32 sums in another order: 5e-6 of the largest value; one lost history slot makes 1e-2."""
    bound = 2e-5 * expected.abs().max().item()
    torch.testing.assert_close(computed, expected, atol=bound, rtol=0)


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return make_vae()


@pytest.fixture(scope="module")
def video() -> Tensor:
    return torch.rand(2, 3, 21, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, 3, 7, 2, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def encoded(vae: WanVae, video: Tensor) -> Tensor:
    return vae.encode(video, chunk=1)


@pytest.fixture(scope="module")
def decoded(vae: WanVae, latents: Tensor) -> Tensor:
    return vae.decode(latents, chunk=1, clamp=False)


def cuts(total: int) -> st.SearchStrategy[list[int]]:
    """Sizes of consecutive chunks, each at least 1, that sum to `total`.

    Tests that draw them take their tensors from `request`: as arguments, Hypothesis would print them on a failure.
    """
    return st.sets(st.integers(1, total - 1)).map(
        lambda edges: [b - a for a, b in itertools.pairwise([0, *sorted(edges), total])]
    )


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


@settings(max_examples=8, deadline=None)
@given(sizes=cuts(7))
def test_decoded_stream_equals_whole_clip(sizes: list[int], request: pytest.FixtureRequest) -> None:
    vae, latents, decoded = map(request.getfixturevalue, ("vae", "latents", "decoded"))
    state = DecoderState()
    parts = [vae.decode_stream(part, state, clamp=False) for part in latents.split(sizes, 2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    assert_same(torch.cat(parts, 2), decoded)


@settings(max_examples=8, deadline=None)
@given(sizes=cuts(21))
def test_encoded_stream_equals_whole_clip(sizes: list[int], request: pytest.FixtureRequest) -> None:
    vae, video, encoded = map(request.getfixturevalue, ("vae", "video", "encoded"))
    state = EncoderState()
    parts = [vae.encode_stream(part, state) for part in video.split(sizes, 2)]
    assert_same(torch.cat(parts, 2), encoded)
    assert state.pending is None


def test_frames_of_an_unfinished_latent_wait(vae: WanVae, video: Tensor, encoded: Tensor) -> None:
    state = EncoderState()
    assert vae.encode_stream(video[:, :, :4], state).shape == (2, 3, 1, 2, 3)
    assert state.pending is not None and state.pending.shape[2] == 3
    assert_same(vae.encode_stream(video[:, :, 4:5], state), encoded[:, :, 1:2])


@pytest.mark.parametrize("chunk", [2, 3, 100, None])
def test_chunk_size_does_not_matter(
    chunk: int | None, vae: WanVae, video: Tensor, encoded: Tensor, latents: Tensor, decoded: Tensor
) -> None:
    assert_same(vae.encode(video, chunk=chunk), encoded)
    assert_same(vae.decode(latents, chunk=chunk, clamp=False), decoded)


def test_first_latent_frame_is_one_pixel_frame_and_causal(vae: WanVae, latents: Tensor, decoded: Tensor) -> None:
    assert decoded.shape == (2, 3, 25, 16, 24)
    changed = latents.clone()
    changed[:, :, 3:] += 1
    again = vae.decode(changed, clamp=False)
    assert_same(again[:, :, :9], decoded[:, :, :9])
    assert (again[:, :, 9:] - decoded[:, :, 9:]).abs().amax((0, 1, 3, 4)).min() > 1e-4


def test_streams_fork_and_restart(vae: WanVae, latents: Tensor, decoded: Tensor) -> None:
    state = DecoderState()
    vae.decode_stream(latents[:, :, :3], state)
    fork = state.clone()
    vae.decode_stream(latents[:, :, :2] * 3, fork)
    rest = vae.decode_stream(latents[:, :, 3:], state, clamp=False)
    assert_same(rest, decoded[:, :, 9:])
    assert_same(vae.decode_stream(latents, DecoderState(), clamp=False), decoded)


def test_slots_keep_shape_and_owned_memory(vae: WanVae, latents: Tensor, video: Tensor) -> None:
    decoder, encoder = DecoderState(), EncoderState()
    vae.decode_stream(latents[:, :, :1], decoder)
    vae.encode_stream(video[:, :, :1], encoder)
    shapes = [[slot.shape for slot in state.slots] for state in (decoder, encoder)]
    vae.decode_stream(latents, decoder)
    vae.encode_stream(video[:, :, :20], encoder)
    assert shapes == [[slot.shape for slot in state.slots] for state in (decoder, encoder)]
    for slot in (*decoder.slots, *encoder.slots):
        assert slot.untyped_storage().nbytes() == slot.numel() * slot.element_size()


def test_a_failed_chunk_leaves_the_stream_as_it_was(vae: WanVae, latents: Tensor, decoded: Tensor) -> None:
    state = DecoderState()
    vae.decode_stream(latents[:, :, :2], state)
    handle = vae.decoder.upsamples[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vae.decode_stream(latents[:, :, 2:3], state)
    handle.remove()
    rest = vae.decode_stream(latents[:, :, 2:], state, clamp=False)
    assert_same(rest, decoded[:, :, 5:])


def test_states_cross_inference_mode(vae: WanVae, latents: Tensor, decoded: Tensor) -> None:
    state = DecoderState()
    with torch.inference_mode():
        vae.decode_stream(latents[:, :, :2], state)
    rest = vae.decode_stream(latents[:, :, 2:], state, clamp=False)
    assert_same(rest, decoded[:, :, 5:])


def test_decode_into_given_memory_and_lazily(vae: WanVae, latents: Tensor, decoded: Tensor) -> None:
    out = torch.full((2, 3, 25, 16, 24), float("nan"))
    assert vae.decode(latents, out=out) is out
    assert_same(out, decoded.clamp(-1, 1))
    pieces = vae.decode_frames(latents, chunk=2)
    assert next(pieces).shape[2] == 5 and next(pieces).shape[2] == 8
    with pytest.raises(ValueError, match="out has shape"):
        vae.decode(latents, out=out[:, :, 1:])


def test_trailing_frames_are_dropped_with_a_warning(vae: WanVae, video: Tensor, encoded: Tensor) -> None:
    for frames in (18, 19, 20):
        with pytest.warns(UserWarning, match=f"last {frames - 17} have no latent frame"):
            kept = vae.encode(video[:, :, :frames])
        assert_same(kept, encoded[:, :, :5])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 5, 16, 16), r"\[batch, 3, frames, rows, columns\]"),
        ((1, 4, 5, 16, 16), r"\[batch, 3, frames, rows, columns\]"),
        ((1, 3, 0, 16, 16), r"shape \(1, 3, 0, 16, 16\)"),
        ((1, 3, 5, 20, 16), "20 rows and 16 columns; both must be multiples of 8"),
        ((1, 3, 5, 16, 12), "multiples of 8"),
    ],
)
def test_wrong_video_is_refused(vae: WanVae, shape: tuple[int, ...], message: str) -> None:
    for call in (vae.encode, lambda x: vae.encode_stream(x, EncoderState()), lambda x: encode_tiled(vae, x)):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))


def test_wrong_latents_are_refused(vae: WanVae) -> None:
    calls = (vae.decode, vae.decode_frames, lambda z: vae.decode_stream(z, DecoderState()))
    for call, shape in itertools.product(calls, [(1, 4, 1, 2, 2), (3, 1, 2, 2), (1, 3, 0, 2, 2)]):
        with pytest.raises(ValueError, match=r"\[batch, 3, frames, rows, columns\] is needed"):
            call(torch.zeros(shape))


def test_pixels_that_are_not_scaled_are_refused(vae: WanVae) -> None:
    with pytest.raises(ValueError, match="uint8"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))


def test_a_state_belongs_to_one_picture_size(vae: WanVae, latents: Tensor, video: Tensor) -> None:
    decoder, encoder = DecoderState(), EncoderState()
    vae.decode_stream(latents, decoder)
    vae.encode_stream(video[:, :, :3], encoder)
    for other in (latents[:1], latents[..., :2]):
        with pytest.raises(ValueError, match="start a new state"):
            vae.decode_stream(other, decoder)
    for other in (video[:1], video[..., :16]):
        with pytest.raises(ValueError, match="start a new state"):
            vae.encode_stream(other, encoder)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_tiles_cover_everything_and_none_is_superfluous(length: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    starts = tile_starts(length, size, stride)
    covered = {row for start in starts for row in range(start, min(start + size, length))}
    assert covered == set(range(length))
    assert all(start + size < length for start in starts[:-1])


def test_one_tile_is_the_whole_picture(vae: WanVae, latents: Tensor, decoded: Tensor, video: Tensor) -> None:
    assert_same(decode_tiled(vae, latents), decoded.clamp(-1, 1))
    assert_same(encode_tiled(vae, video), vae.encode(video))


def test_every_clip_of_a_batch_is_tiled_alike(vae: WanVae) -> None:
    clips = torch.rand(2, 3, 5, 32, 40, generator=torch.Generator().manual_seed(3)) * 2 - 1
    both = encode_tiled(vae, clips, (3, 3), (2, 1))
    assert_same(both[1:], encode_tiled(vae, clips[1:], (3, 3), (2, 1)))
    assert decode_tiled(vae, both, (3, 3), (3, 2)).shape == clips.shape


def test_ramps() -> None:
    assert ramp(6, 2, False, False).tolist() == [0.5, 1, 1, 1, 1, 0.5]
    assert ramp(3, 2, True, False).tolist() == [1, 1, 0.5]
    assert ramp(3, 0, False, False).tolist() == [1, 1, 1]


def test_gaps_between_tiles_are_refused(vae: WanVae, latents: Tensor) -> None:
    with pytest.raises(ValueError, match="gaps"):
        decode_tiled(vae, latents, (2, 2), (3, 1))


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


@pytest.mark.parametrize("precision", [BF16, BF16_AUTOCAST, BF16_MODULE])
def test_bf16_stays_near_float32(precision: VaePrecision, video: Tensor, latents: Tensor, decoded: Tensor) -> None:
    half = make_vae().set_precision(precision)
    state = DecoderState()
    frames = half.decode_stream(latents, state, clamp=False)
    assert frames.dtype == torch.float32
    assert {slot.dtype for slot in state.slots} == {torch.bfloat16}
    assert 1e-4 < (frames - decoded).norm() / decoded.norm() < 0.15  # random weights amplify single roundings
    whole = make_vae().encode(video)
    assert (half.encode(video) - whole).norm() / whole.norm() < 0.15


def test_constants_round_in_the_flow_s_order() -> None:
    vae = WanVae(replace(WAN21_VAE, dim=2))
    inverses = [float(vae.set_precision(flow).latent_scale()[1][5]) for flow in (BF16_AUTOCAST, BF16_MODULE, FLOAT32)]
    assert inverses == [0.5625, 0.56640625, pytest.approx(1 / 1.7708, rel=1e-7)]


def test_a_fresh_vae_learns_through_both_halves() -> None:
    torch.manual_seed(0)
    vae = WanVae(replace(TINY, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3))
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        mean, log_variance = vae.encode_moments(clip)
        assert mean.shape == log_variance.shape == (1, 3, 2, 2, 2)
        sample = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        loss = (vae.decode(vae.normalise(sample), clamp=False, chunk=None) - clip).square().mean()
        loss = loss + 1e-3 * (mean.square() + log_variance.exp() - log_variance).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_do_not_depend_on_chunks(vae: WanVae, latents: Tensor) -> None:
    gradients = []
    for chunk in (None, 2):
        z = latents[:1, :, :4].clone().requires_grad_()
        vae.decode(z, clamp=False, chunk=chunk).square().mean().backward()
        gradients.append(z.grad)
    assert_same(gradients[0], gradients[1])
