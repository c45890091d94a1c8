"""The Wan VAE: streams cut anywhere equal whole clips, tiles, errors, rounding, training."""

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
    VaePrecision,
    WanVae,
)
from kinora.graphs.models.wan_vae_tiled import decode_tiled, encode_tiled, ramp, tile_starts
from small_vae import TINY, assert_same, make_vae
from torch import Tensor


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


def test_moments_of_a_stream_without_temporal_downsampling() -> None:
    vae = make_vae(replace(TINY, temporal_downsample=(False, False, False)))
    video, state = torch.rand(1, 3, 3, 8, 8) * 2 - 1, EncoderState()
    pieces = [vae.stream_moments(part, state)[0] for part in video.split((2, 1), 2)]
    assert_same(torch.cat(pieces, 2), vae.encode(video, normalised=False))


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
