"""LiveAvatar's transformer: ring arithmetic, streaming against training, batching, errors (liveavatar.md, 2)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinora.graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar, LiveAvatarConfig, RollingCache, ref_shift
from kinora.graphs.models.liveavatar_cache import ring_slot
from kinora.graphs.models.liveavatar_init import init_weights
from kinora.graphs.models.liveavatar_rope import frame_table, sample_positions
from kinora.kernels import ops
from torch import Tensor

TINY = LiveAvatarConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=3,
    freq_dim=16,
    text_dim=6,
    text_len=4,
    audio_dim=5,
    audio_layers=3,
    num_audio_token=2,
    audio_inject_layers=(0, 2),
    cache_frames=6,
    num_frames_per_block=3,
)
HEIGHT, WIDTH = 8, 12
PATCHES = HEIGHT * WIDTH // 4


def tiny(config: LiveAvatarConfig = TINY, seed: int = 0) -> LiveAvatar:
    """Random weights everywhere, so that no branch is silent."""
    torch.manual_seed(seed)
    model = LiveAvatar(config)
    init_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def clip(frames: int, batch: int = 1) -> dict[str, Tensor]:
    c = TINY
    return {
        "x": torch.randn(batch, c.in_dim, frames, HEIGHT, WIDTH),
        "t": torch.rand(batch, frames) * 1000,
        "context": torch.randn(batch, 3, c.text_dim),
        "audio": torch.randn(batch, c.audio_layers, c.audio_dim, 4 * frames),
        "ref_latents": torch.randn(batch, c.in_dim, 1, HEIGHT, WIDTH),
        "motion_latents": torch.randn(batch, c.in_dim, 19, HEIGHT, WIDTH),
    }


def stream(model: LiveAvatar, data: dict[str, Tensor], distance: int) -> Tensor:
    """The clip block by block through one rolling cache; every block at the clip's first time."""
    c = model.config
    text = model.embed_text(data["context"])
    time = model.embed_time(data["t"][:, :1])
    condition = model.prefill(data["ref_latents"], data["motion_latents"], text)
    cache = RollingCache.allocate(c, PATCHES)
    flows = []
    for start in range(0, data["x"].shape[2], c.num_frames_per_block):
        end = start + c.num_frames_per_block
        audio = model.encode_audio(data["audio"][..., 4 * start : 4 * end])
        shift = ref_shift(start, distance)
        flows.append(model.forward_block(data["x"][:, :, start:end], time, text, audio, condition, cache, start, shift))
    return torch.cat(flows, 2)


def test_published_size_and_keys() -> None:
    with torch.device("meta"):
        state = LiveAvatar(LIVEAVATAR_14B).state_dict()
    assert len(state) == 1260
    assert sum(value.numel() for value in state.values()) == 16_295_755_609
    expected = {
        "patch_embedding.weight": (5120, 16, 1, 2, 2),
        "text_embedding.0.weight": (5120, 4096),
        "time_embedding.0.weight": (5120, 256),
        "time_projection.1.weight": (30720, 5120),
        "blocks.39.modulation": (1, 6, 5120),
        "blocks.7.self_attn.norm_q.weight": (5120,),
        "blocks.0.norm3.bias": (5120,),
        "blocks.0.ffn.2.weight": (5120, 13824),
        "head.modulation": (1, 2, 5120),
        "head.head.weight": (64, 5120),
        "cond_encoder.bias": (5120,),
        "casual_audio_encoder.weights": (1, 25, 1, 1),
        "casual_audio_encoder.encoder.padding_tokens": (1, 1, 1, 5120),
        "casual_audio_encoder.encoder.conv1_local.conv.weight": (5120, 1024, 3),
        "casual_audio_encoder.encoder.conv1_global.conv.weight": (1280, 1024, 3),
        "casual_audio_encoder.encoder.conv2.conv.weight": (2560, 1280, 3),
        "casual_audio_encoder.encoder.final_linear.weight": (5120, 5120),
        "audio_injector.injector.11.k.weight": (5120, 5120),
        "audio_injector.injector_adain_layers.0.linear.weight": (10240, 5120),
        "trainable_cond_mask.weight": (3, 5120),
        "frame_packer.proj_4x.weight": (5120, 16, 4, 8, 8),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


@given(blocks=st.integers(1, 6), length=st.integers(1, 7), count=st.integers(1, 20))
def test_ring_holds_the_last_blocks(blocks: int, length: int, count: int) -> None:
    capacity = blocks * length
    ring: list[int | None] = [None] * capacity
    for start in range(0, count * length, length):
        slot = ring_slot(start, length, capacity)
        ring[slot.write : slot.write + length] = range(start, start + length)
        attended = ring[slot.first : slot.end]
        assert sorted(attended, key=str) == sorted(range(max(0, start + length - capacity), start + length), key=str)


@given(length=st.integers(1, 6), blocks=st.integers(1, 5), window=st.integers(1, 30), block=st.integers(0, 4))
def test_ring_window_ends_with_the_block(length: int, blocks: int, window: int, block: int) -> None:
    capacity, start = blocks * length, block * length
    if start >= capacity:
        with pytest.raises(ValueError, match="before the ring"):
            ring_slot(start, length, capacity, window)
        return
    slot = ring_slot(start, length, capacity, window)
    assert (slot.write, slot.end) == (start, start + length)
    assert slot.end - slot.first == min(window, slot.end)


@given(start=st.integers(0, 200), length=st.integers(1, 20), capacity=st.integers(1, 60))
def test_ring_never_writes_outside(start: int, length: int, capacity: int) -> None:
    if start % capacity + length > capacity:
        with pytest.raises(ValueError, match="cross the end"):
            ring_slot(start, length, capacity)
    else:
        slot = ring_slot(start, length, capacity)
        assert slot.first <= slot.write and slot.write + length <= slot.end <= capacity


@given(frame=st.integers(0, 1_000_000), distance=st.integers(4, 30))
def test_reference_stays_ahead(frame: int, distance: int) -> None:
    assert 30 + ref_shift(frame, distance) == max(30, frame + distance)


@given(start=st.integers(-40, 40), count=st.integers(1, 20), extra=st.integers(0, 40))
def test_positions_stay_in_their_span(start: int, count: int, extra: int) -> None:
    span = count + extra
    places = sample_positions(start, count, span if start >= 0 else min(span, -start))
    assert len(places) == count and places[0] == start
    assert bool((places == places.trunc()).all()) and bool((places.diff() >= 0).all())
    assert places[-1] < (start + span if start >= 0 else 0)


def test_rotary_table_is_analytic_and_rounded() -> None:
    far = frame_table(1_000_000, 1, (1, 1), 12, torch.float16)
    exact = frame_table(1_000_000, 1, (1, 1), 12, torch.float32)
    assert torch.equal(far, far.half().float())
    assert 0 < (far - exact).abs().max() < 2**-11
    assert torch.allclose(exact.square().sum(-1), torch.ones(1, 6))


def test_rope_per_sample_equals_one_by_one() -> None:
    x, rope = torch.randn(2, 5, 3, 8), torch.randn(2, 4, 4, 2)
    both = ops.apply_rope(x, rope)
    assert torch.equal(both, torch.cat([ops.apply_rope(x[i : i + 1], rope[i]) for i in range(2)]))


@torch.no_grad()
def test_training_window_equals_streaming() -> None:
    """Five blocks through a ring of two: each sees itself and the one before, and the condition tokens."""
    model, data = tiny(), clip(15)
    data["t"] = data["t"][:, :1].expand(-1, 15)
    streamed = stream(model, data, distance=4)  # the reference does not move in a clip this short
    trained = model.forward_train(**data, history_blocks=1, audio_per_block=True)
    assert torch.allclose(streamed, trained, atol=2e-5)
    unlimited = model.forward_train(**data, audio_per_block=True)
    assert torch.allclose(streamed[:, :, :6], unlimited[:, :, :6], atol=2e-5)
    assert (streamed - unlimited)[:, :, 6:].abs().max() > 1e-3
    whole_audio = model.forward_train(**data, history_blocks=1)
    assert (streamed - whole_audio).abs().max() > 1e-3


@torch.no_grad()
def test_a_moved_reference_changes_streaming_and_training_alike() -> None:
    model, data = tiny(), clip(3)
    data["t"] = data["t"][:, :1].expand(-1, 3)
    text = model.embed_text(data["context"])
    condition = model.prefill(data["ref_latents"], data["motion_latents"], text)
    audio, time = model.encode_audio(data["audio"]), model.embed_time(data["t"])
    whole_ring = replace(TINY, cache_frames=3)  # one block: a far start sees no unwritten rows
    flow = model.forward_block(
        data["x"], time, text, audio, condition, RollingCache.allocate(whole_ring, PATCHES), 300, ref_shift(300, 9)
    )
    trained = model.forward_train(**data, frame_offset=300, ref_shift=ref_shift(300, 9))
    assert torch.allclose(flow, trained, atol=2e-5)
    assert (flow - model.forward_train(**data)).abs().max() > 1e-4


@torch.no_grad()
def test_batched_training_equals_per_sample() -> None:
    model, data = tiny(), clip(6, batch=3)
    data["context"] = data["context"][:1]
    offset, shift = torch.tensor([0, 300, 60_000]), torch.tensor([0, 279, 59_990])
    options = {"history_blocks": 1, "audio_per_block": True}
    together = model.forward_train(**data, frame_offset=offset, ref_shift=shift, **options)
    for i in range(3):
        own = {name: value[i : i + 1] if name != "context" else value for name, value in data.items()}
        alone = model.forward_train(**own, frame_offset=int(offset[i]), ref_shift=int(shift[i]), **options)
        assert torch.allclose(together[i : i + 1], alone, atol=2e-5)


@torch.no_grad()
def test_batched_streaming_equals_per_sample() -> None:
    model, data = tiny(), clip(3, batch=2)

    def run(rows: slice) -> Tensor:
        own = {name: value[rows] for name, value in data.items()}
        text = model.embed_text(own["context"])
        condition = model.prefill(own["ref_latents"], own["motion_latents"], text)
        cache = RollingCache.allocate(TINY, PATCHES, batch=own["x"].shape[0])
        audio, time = model.encode_audio(own["audio"]), model.embed_time(own["t"])
        return model.forward_block(own["x"], time, text, audio, condition, cache, 0, 0)

    assert torch.allclose(run(slice(0, 2)), torch.cat((run(slice(0, 1)), run(slice(1, 2)))), atol=2e-5)


@torch.no_grad()
def test_one_time_row_serves_all_frames_and_no_pose_is_a_zero_pose() -> None:
    model, data = tiny(), clip(3)
    text = model.embed_text(data["context"])
    condition = model.prefill(data["ref_latents"], data["motion_latents"], text)
    audio, rest = model.encode_audio(data["audio"]), (0, 0)

    def run(t: Tensor, **more: Tensor) -> Tensor:
        cache = RollingCache.allocate(TINY, PATCHES)
        return model.forward_block(data["x"], model.embed_time(t), text, audio, condition, cache, *rest, **more)

    one = run(torch.full((1, 1), 500.0))
    assert torch.allclose(one, run(torch.full((1, 3), 500.0)), atol=1e-5)
    pose = torch.zeros(1, TINY.cond_dim, 3, HEIGHT, WIDTH)
    assert torch.allclose(one, run(torch.full((1, 1), 500.0), cond_states=pose), atol=1e-5)
    assert (one - run(torch.full((1, 1), 500.0), cond_states=pose + 1)).abs().max() > 1e-3


@torch.no_grad()
def test_actors_with_disjoint_masks_hear_only_their_own_voice() -> None:
    model, data = tiny(), clip(3)
    voices = data["audio"].repeat(2, 1, 1, 1) * torch.tensor([1.0, -2.0])[:, None, None, None]
    x = torch.randn(1, 3 * PATCHES, TINY.dim)
    left = torch.zeros(3 * PATCHES)
    left[::2] = 1
    both = model.inject_audio(0, x, model.encode_audio(voices), torch.stack((left, 1 - left)))
    alone = [model.inject_audio(0, x, model.encode_audio(voices[i : i + 1]), None) for i in range(2)]
    expected = torch.where(left.bool()[None, :, None], alone[0], alone[1])
    assert torch.allclose(both, expected, atol=1e-5)


def test_every_parameter_learns() -> None:
    model, data = tiny(), clip(6, batch=2)
    pose = torch.randn(2, TINY.cond_dim, 6, HEIGHT, WIDTH)
    model.forward_train(**data, cond_states=pose).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@torch.no_grad()
def test_start_values() -> None:
    torch.manual_seed(0)
    model = LiveAvatar(TINY)
    init_weights(model)
    data = clip(3)
    assert not model.forward_train(**data).any()  # the head starts at zero
    injected = model.inject_audio(0, torch.randn(1, 3 * PATCHES, TINY.dim), model.encode_audio(data["audio"]), None)
    assert injected.abs().sum() > 0 and not model.audio_injector.injector[0].o.weight.any()
    assert not model.trainable_cond_mask.weight.any() and not model.cond_encoder.weight.any()
    assert torch.equal(model.casual_audio_encoder.weights, torch.full((1, 3, 1, 1), 0.01))
    assert 0.5 < model.blocks[0].modulation.std() * TINY.dim**0.5 < 1.5
    kept = LiveAvatar(replace(TINY, zero_init=False))
    init_weights(kept)
    assert kept.trainable_cond_mask.weight.any() and kept.cond_encoder.weight.any()


@torch.no_grad()
def test_errors_say_what_to_do() -> None:
    model, data = tiny(), clip(3)
    text = model.embed_text(data["context"])
    condition = model.prefill(data["ref_latents"], data["motion_latents"], text)
    cache, time = RollingCache.allocate(TINY, PATCHES), model.embed_time(data["t"])
    audio = model.encode_audio(data["audio"])
    two = model.encode_audio(data["audio"].repeat(2, 1, 1, 1))
    x = data["x"]

    def run(x: Tensor = x, audio=audio, start: int = 0, **more: Tensor) -> None:
        model.forward_block(x, time, text, audio, condition, cache, start, 0, **more)

    with pytest.raises(ValueError, match="2 actors speak but there is no actor mask"):
        run(audio=two)
    with pytest.raises(ValueError, match="actor_mask has shape"):
        run(audio=two, actor_mask=torch.ones(2, 3, 1, 1, 1))
    with pytest.raises(ValueError, match="must be even"):
        run(x[..., :-1])
    with pytest.raises(ValueError, match=r"\[B, channels, frames, height, width\]"):
        run(x[0])
    with pytest.raises(ValueError, match="a block has 3"):
        run(x[:, :, :2])
    with pytest.raises(ValueError, match="prefill and allocate for the size of x"):
        run(x[..., :-2])
    with pytest.raises(ValueError, match="cross the end"):
        run(start=4)
    with pytest.raises(ValueError, match="the audio covers 2 latent frames"):
        run(audio=model.encode_audio(data["audio"][..., :8]))
    with pytest.raises(ValueError, match="audio window has 10 frames"):
        model.encode_audio(data["audio"][..., :10])
    with pytest.raises(ValueError, match=r"this model needs \(3, 5\)"):
        model.encode_audio(data["audio"][:, :2])
    with pytest.raises(ValueError, match="not whole blocks of 12"):
        model.encode_audio(data["audio"][..., :8], per_block=True)
    with pytest.raises(ValueError, match="prompt has 5 rows"):
        model.embed_text(torch.randn(1, 5, TINY.text_dim))
    with pytest.raises(ValueError, match="cond_states"):
        run(cond_states=torch.zeros(1, TINY.cond_dim, 1, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="one latent frame of the picture"):
        model.prefill(data["motion_latents"], data["motion_latents"], text)
    with pytest.raises(ValueError, match="add_last_motion is 3"):
        model.prefill(data["ref_latents"], data["motion_latents"], text, add_last_motion=3)
    with pytest.raises(ValueError, match="whole blocks of 3"):
        model.forward_train(**clip(4))
    with pytest.raises(ValueError, match="one time per frame"):
        model.forward_train(**{**data, "t": data["t"][0]})


@torch.no_grad()
def test_local_window_only_before_the_wrap() -> None:
    model, data = tiny(replace(TINY, local_attn_size=3)), clip(9)
    with pytest.raises(ValueError, match="local_attn_size"):
        stream(model, data, 4)


def test_injection_layers_count_upwards_however_they_are_listed() -> None:
    assert tiny(replace(TINY, audio_inject_layers=(2, 0))).injection_index == {0: 0, 2: 1}


def test_published_config_is_checked() -> None:
    published = {"dim": 48, "num_heads": 4, "num_layers": 2, "audio_inject_layers": [0, 1], "zero_timestep": True}
    config = LiveAvatarConfig.from_published({**published, "_class_name": "WanModel_S2V"}, audio_layers=4)
    assert (config.dim, config.audio_inject_layers, config.audio_layers) == (48, (0, 1), 4)
    with pytest.raises(ValueError, match="enable_motioner=True is not supported"):
        LiveAvatarConfig.from_published({**published, "enable_motioner": True})
    with pytest.raises(ValueError, match="'flow_shift' is not known"):
        LiveAvatarConfig.from_published({**published, "flow_shift": 3})
    for wrong in (
        {"dim": 30, "num_heads": 4},
        {"audio_inject_layers": (3,)},
        {"cache_frames": 7},
        {"framepack_drop_mode": "x"},
    ):
        with pytest.raises(ValueError):
            replace(TINY, **wrong)


@torch.no_grad()
def test_dropped_motion_groups_shorten_the_condition() -> None:
    model, data = tiny(replace(TINY, framepack_drop_mode="drop")), clip(3)
    text = model.embed_text(data["context"])
    lengths = []
    for last in (2, 1, 0):
        condition = model.prefill(data["ref_latents"], data["motion_latents"], text, add_last_motion=last)
        lengths.append(condition.layers[0].k.shape[1])
        assert condition.rope(5).shape[0] == lengths[-1]
    assert lengths == [2 * PATCHES + 6 + 4, PATCHES + 6 + 4, PATCHES + 4]


@torch.no_grad()
def test_latents_too_small_for_the_coarse_groups() -> None:
    model = tiny()
    text = model.embed_text(torch.randn(1, 2, TINY.text_dim))
    condition = model.prefill(torch.randn(1, 16, 1, 4, 6), torch.randn(1, 16, 19, 4, 6), text)
    assert condition.layers[0].k.shape[1] == 6 + 6 + 1  # reference, newest frame, two frames as one token
