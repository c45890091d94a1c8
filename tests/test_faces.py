"""The drawn world: identities by seed, the renderer, the sound-to-motion driver, measuring from pixels."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.models import speech_features as sf
from kinora.runtime import faces
from kinora.runtime.faces import motion as driver
from kinora.runtime.faces import parts
from torch import Tensor

SIZE = 96


def babble(seconds: float, seed: int = 0, batch: int = 1) -> Tensor:
    """Sound like speech to the driver: bursts of noise and tones between pauses, [batch, samples]."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(seconds * sf.SAMPLE_RATE)
    time = torch.arange(samples) / sf.SAMPLE_RATE
    pitch = 120.0 + 80.0 * torch.rand(batch, 1, generator=generator)
    voice = sum(torch.sin(2 * torch.pi * pitch * k * time) / k for k in range(1, 16))
    steps = int(seconds * 8) + 2
    syllables = torch.rand(batch, 1, steps, generator=generator).square()
    phrases = (torch.rand(batch, 1, steps // 8 + 2, generator=generator) < 0.7).float()
    syllables = syllables * F.interpolate(phrases, size=steps, mode="nearest")
    envelope = F.interpolate(syllables, size=samples, mode="linear")[:, 0]
    return 0.2 * envelope * (voice + 0.3 * torch.randn(batch, samples, generator=generator))


def still_motion(**curves: float) -> faces.Motion:
    rest = faces.rest_motion()
    return faces.Motion(**{name: getattr(rest, name) + curves.get(name, 0.0) for name in vars(rest)})


def blurred(video: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of every picture of [3, T, H, W]."""
    kernel = torch.exp(-(torch.arange(-5, 6) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    frames = F.conv2d(video.transpose(0, 1), kernel, padding=(0, 5), groups=3)
    return F.conv2d(frames, kernel.transpose(2, 3), padding=(5, 0), groups=3).transpose(0, 1)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])


def same(a: faces.Motion, b: faces.Motion, **tolerance: float) -> None:
    for name in vars(a):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# Identities and renderer


def test_a_seed_is_one_face_in_every_batch():
    batch = faces.sample_identities([5, 77, faces.HELD_OUT_SEED])
    alone = faces.sample_identities([77])
    for name in vars(alone):
        assert torch.equal(getattr(batch[1:2], name), getattr(alone, name)), name
    rest = faces.rest_motion(3)
    assert torch.equal(faces.render(batch, rest, SIZE)[1:2], faces.render(alone, rest[:1], SIZE))


def test_faces_of_different_seeds_differ():
    video = faces.render(faces.sample_identities(list(range(24))), faces.rest_motion(24), 48)[:, :, 0].flatten(1)
    distance = torch.cdist(video, video) / video.shape[1] ** 0.5
    assert distance[~torch.eye(24, dtype=torch.bool)].min() > 0.1


def test_colours_stay_in_range():
    identity = faces.sample_identities(list(range(200)))
    for name, parameter in vars(identity).items():
        assert parameter.isfinite().all(), name
        if parameter.ndim == 2:
            assert parameter.min() >= 0.0 and parameter.max() <= 1.0, name
    video = faces.render(identity, faces.rest_motion(200), 32)
    assert video.min() >= -1.0 and video.max() <= 1.0


@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 4), frames=st.integers(1, 7), chunk=st.integers(1, 4))
def test_chunks_do_not_change_the_picture(batch, frames, chunk):
    identity = faces.sample_identities(list(range(batch)))
    motion = faces.motion_from_audio(babble(1.0, batch=batch))[:, 10 : 10 + frames]
    whole = faces.render(identity, motion, SIZE)
    pieces = faces.render(identity, motion, SIZE, chunk=chunk)  # 4 pictures of this size for each of 192 pixels
    assert whole.shape == (batch, 3, frames, SIZE, SIZE)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-6)


def test_layers_fit_their_regions(monkeypatch):
    """Drawing the moving layers over the whole picture changes nothing, in the extreme poses."""
    module = importlib.import_module("kinora.runtime.faces.render")
    ends = torch.rand(8, 40, 3, generator=torch.Generator().manual_seed(0)).round()
    opened, signs = ends[0], ends[1:] * 2 - 1
    turned = (driver.TURN * signs[1], driver.NOD * signs[2], driver.TILT * signs[3])
    motion = faces.Motion(opened, signs[0], 1 - opened, *turned, signs[4], signs[5])
    identity = faces.sample_identities(list(range(40)))
    cropped = faces.render(identity, motion, 64)
    for name in ("HEAD", "UPPER_FACE", "LOWER_FACE"):
        monkeypatch.setattr(module, name, module.WHOLE)
    assert torch.equal(faces.render(identity, motion, 64), cropped)


def test_a_shut_mouth_shows_nothing_of_its_inside():
    identity = faces.sample_identities(list(range(60)))
    shut = faces.render(identity, faces.rest_motion(60), 128)
    assert max(float(faces.mouth_opening(video)) for video in shut) == 0.0
    wide = faces.rest_motion(60)
    wide.openness.fill_(1.0)
    opened = faces.render(identity, wide, 128)
    assert min(float(faces.mouth_opening(video)) for video in opened) > 0.05 * 128
    inside = torch.tensor(parts.MOUTH_INSIDE)[:, None, None, None] * 2 - 1
    distance = (shut - inside[None]).square().sum(1).sqrt()
    assert distance.amin() > 0.1  # the colour is the mouth's own


def test_the_fully_open_mouth_spans_14_pixels_of_192():
    sizes = faces.sample_identities(list(range(300)))
    gap = parts.MOUTH_GAP * sizes.mouth_size * sizes.rest_scale * 192 / 2
    assert gap.min() > 14.0


@pytest.mark.parametrize(
    ("curve", "value"),
    [("openness", 0.5), ("width", 1.0), ("blink", 1.0), ("yaw", 0.1), ("pitch", 0.08), ("roll", 0.08), ("gaze_x", 1.0)],
)
def test_every_curve_moves_the_picture(curve, value):
    identity = faces.sample_identities([3])
    rest = faces.render(identity, faces.rest_motion(), SIZE)
    moved = faces.render(identity, still_motion(**{curve: value}), SIZE)
    assert ((moved - rest).abs().amax(1) > 0.1).sum() >= 8


def test_the_head_turns_the_way_its_angles_say():
    """Dark pupils of a bald face move right with yaw and down with pitch."""
    identity = faces.sample_identities([3])

    def centre_of_change(**curves: float) -> Tensor:
        blink = faces.render(identity, still_motion(blink=1.0, **curves), SIZE)
        opened = faces.render(identity, still_motion(**curves), SIZE)
        weight = (blink - opened)[0, :, 0].abs().sum(0)
        grid = torch.arange(SIZE, dtype=torch.float32)
        return torch.stack(((weight.sum(0) * grid).sum(), (weight.sum(1) * grid).sum())) / weight.sum()

    rest = centre_of_change()
    assert centre_of_change(yaw=0.1)[0] > rest[0] + 1.0
    assert centre_of_change(pitch=0.08)[1] > rest[1] + 0.5


def test_render_says_what_does_not_fit():
    with pytest.raises(ValueError, match="one motion row for each face"):
        faces.render(faces.sample_identities([1, 2]), faces.rest_motion(3))
    with pytest.raises(ValueError, match="at least 16"):
        faces.render(faces.sample_identities([1]), faces.rest_motion(), 8)
    with pytest.raises(ValueError, match="at least one seed"):
        faces.sample_identities([])


def test_portrait_is_the_rest_frame():
    picture = faces.draw_portrait(11, 64)
    assert picture.size == (64, 64) and picture.mode == "RGB"
    assert picture.tobytes() == faces.draw_portrait(11, 64).tobytes()
    assert picture.tobytes() != faces.draw_portrait(12, 64).tobytes()


# Speech features and driver


def test_band_powers_are_mean_squares_on_the_grid():
    time = torch.arange(16000) / sf.SAMPLE_RATE
    energies = sf.frame_energies(torch.sin(2 * torch.pi * 1000.0 * time))
    assert energies.shape == (50, sf.N_MELS)
    torch.testing.assert_close(energies[2:-2].sum(-1), torch.full((46,), 0.5), rtol=0.02, atol=0)
    click = torch.zeros(16000)
    click[int(10.5 * sf.HOP)] = 1.0
    assert int(sf.frame_energies(click).sum(-1).argmax()) == 10
    padded = F.pad(click, (sf.MARGIN, sf.MARGIN))
    assert torch.equal(sf.frame_energies(padded, padded=True), sf.frame_energies(click))
    with pytest.raises(ValueError, match="multiple of 320"):
        sf.frame_energies(torch.zeros(700), padded=True)
    with pytest.raises(TypeError, match="32768"):
        sf.frame_energies(torch.zeros(700, dtype=torch.int16))


def test_features_met_in_inference_have_gradients_later():
    sf._filterbank.cache_clear()
    with torch.inference_mode():
        sf.frame_energies(torch.zeros(3200))
    wave = torch.randn(3200, requires_grad=True)
    sf.levelled_log_mel(wave)[0].sum().backward()
    assert wave.grad.isfinite().all() and wave.grad.any()


def test_levels_equal_their_recurrence():
    loudness = 30.0 * torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) - 40.0
    levels, state = sf.track_levels(loudness)
    level = torch.full((3,), sf.LEVEL_FLOOR)
    for t in range(200):
        level = torch.maximum(level - sf.LEVEL_DECAY, loudness[:, t]).clamp(min=sf.LEVEL_FLOOR)
        torch.testing.assert_close(levels[:, t], level, rtol=0, atol=2e-3)
    assert torch.equal(state.float(), levels[:, -1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 5))
def test_levels_do_not_depend_on_chunks(sizes, seed):
    loudness = 25.0 * torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(seed)) - 35.0
    whole, _ = sf.track_levels(loudness)
    state, pieces = None, []
    for piece in loudness.split(sizes, -1):
        levels, state = sf.track_levels(piece, state)
        pieces.append(levels)
    assert torch.equal(torch.cat(pieces, -1), whole)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 3))
def test_motion_does_not_depend_on_chunks(sizes, seed):
    """Streaming: features by chunks with the tracker's state, motion from a window of features around each chunk."""
    steps = sum(sizes)  # video frames
    wave = babble(steps * 640 / 16000 + 0.01, seed)[:, : steps * 640]
    whole = faces.motion_from_audio(wave)
    sound = F.pad(wave, (sf.MARGIN, sf.MARGIN))
    state, chunks, at = None, [], 0
    for size in sizes:
        piece = sound[:, at * 640 : (at + size) * 640 + 2 * sf.MARGIN]
        features, state = sf.levelled_log_mel(piece, state, padded=True)
        chunks.append(features)
        at += size
    features = torch.cat(chunks, 1)
    past, future = driver.PAST_FEATURES + 1, driver.FUTURE_FEATURES + 1  # whole video frames
    around = F.pad(features, (0, 0, past, future), value=-1.0)
    at, moved = 0, []
    for size in sizes:
        window = around[:, 2 * at : 2 * (at + size) + past + future]
        moved.append(faces.motion_from_features(window)[:, past // 2 : past // 2 + size])
        at += size
    joined = faces.Motion(**{name: torch.cat([getattr(m, name) for m in moved], 1) for name in vars(whole)})
    same(joined, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wave", [torch.zeros(2, 48000), 1e-4 * torch.randn(2, 48000)], ids=["zeros", "hiss"])
def test_silence_is_the_rest_pose(wave):
    same(faces.motion_from_audio(wave), faces.rest_motion(2, 75), rtol=0, atol=0)


def test_silence_after_speech_shuts_the_mouth_and_blinks():
    wave = babble(2.0, 1)
    wave[:, -9600:] *= 0  # speech ends 0.6 s before the sound's pause is filled up
    motion = faces.motion_from_audio(torch.cat((wave, torch.zeros(1, 48000)), 1))
    assert motion.openness[:, :35].amax() > 0.5
    assert (motion.openness[:, 40:] == 0).all() and (motion.width[:, 40:] == 0).all()
    assert (motion.yaw[:, 72:] == 0).all() and (motion.pitch[:, 72:] == 0).all()
    tone = torch.sin(torch.arange(24000) * 0.15 * torch.pi) * 0.3
    blink = faces.motion_from_audio(torch.cat((tone, torch.zeros(24000))))[0:1].blink[0]
    assert 4 <= int((blink > 0).sum()) <= 6 and blink.max() > 0.9
    assert 37 <= int(blink.argmax()) <= 47  # at 1.5 s and a pause


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 74), st.integers(0, 3))
def test_motion_is_local(frame, seed):
    """Features outside the window of a video frame do not move it."""
    features, _ = sf.levelled_log_mel(babble(3.0, seed))
    other, _ = sf.levelled_log_mel(babble(3.0, seed + 10))
    low, high = 2 * frame - driver.PAST_FEATURES, 2 * frame + 1 + driver.FUTURE_FEATURES
    outside = torch.ones(150, dtype=torch.bool)
    outside[max(0, low) : high + 1] = False
    changed = torch.where(outside[None, :, None], other, features)
    at = slice(frame, frame + 1)
    same(faces.motion_from_features(changed)[:, at], faces.motion_from_features(features)[:, at], rtol=0, atol=1e-6)


def test_motion_hears_at_most_a_tenth_of_a_second_ahead():
    wave = babble(3.0, 2)
    motion = faces.motion_from_audio(wave)
    for frame in (20, 47):
        heard = wave.clone()
        heard[:, int((frame + 0.5) * 640 + 0.1 * 16000) :] = 0.0
        same(faces.motion_from_audio(heard)[:, : frame + 1], motion[:, : frame + 1], rtol=0, atol=1e-5)


def test_the_mouth_follows_loudness_not_gain():
    wave = babble(3.0, 4)
    motion = faces.motion_from_audio(torch.cat((wave, 0.3 * wave)))
    assert motion.openness.std() > 0.1
    torch.testing.assert_close(motion.openness[0], motion.openness[1], rtol=0, atol=1e-3)


def test_vowels_set_the_width():
    """A spectrum like u rounds the lips, one like i spreads them."""
    time = torch.arange(16000) / sf.SAMPLE_RATE

    def vowel(first: float, second: float) -> Tensor:
        harmonics = torch.arange(1, 40)[:, None] * 130.0
        gain = sum(1 / (1 + ((harmonics - formant) / 90.0) ** 2) for formant in (first, second))
        return 0.2 * (gain * torch.sin(2 * torch.pi * harmonics * time)).sum(0)

    motion = faces.motion_from_audio(torch.stack((vowel(350, 700), vowel(350, 2300))))
    assert motion.width[0, 10:20].mean() < -0.3 and motion.width[1, 10:20].mean() > 0.3


def test_bad_sound_is_refused():
    with pytest.raises(ValueError, match=r"\[samples\] or \[B, samples\]"):
        faces.motion_from_audio(torch.zeros(1, 2, 3200))


# Measuring


def test_the_measured_opening_is_the_drivers():
    generator = torch.Generator().manual_seed(0)
    seeds = [0, 4, 6, 20, 35, 106]
    motion = faces.motion_from_audio(babble(2.0, 3, len(seeds)))
    video = faces.render(faces.sample_identities(seeds), motion, 192)
    for one, openness in zip(video, motion.openness, strict=True):
        assert correlation(faces.mouth_opening(one), openness) > 0.98
        worse = blurred(one, 1.0) + 0.03 * torch.randn(one.shape, generator=generator)
        assert correlation(faces.mouth_opening(worse), openness) > 0.97


def test_the_still_region_is_still():
    identity = faces.sample_identities([1, 2, 3])
    mask = faces.static_region_mask(identity, SIZE)
    assert mask.shape == (3, SIZE, SIZE) and (mask.float().mean((1, 2)) > 0.2).all()
    video = faces.render(identity, faces.motion_from_audio(babble(3.0, 5, 3)), SIZE)
    for one, still in zip(video, mask, strict=True):
        pixels = one[:, :, still]
        assert (pixels - pixels[:, :1]).abs().max() < 0.02
        assert (one[:, :, ~still].std(1)).max() > 0.1


def test_measure_wants_one_video():
    with pytest.raises(ValueError, match=r"\[3, T, H, W\]"):
        faces.mouth_opening(torch.zeros(1, 3, 2, 32, 32))
