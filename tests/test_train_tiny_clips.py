"""Training of the embedded model: the clips that it sees and the pool of their latents."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.models.speech import to_video_rate
from kinora.graphs.models.speech_features import levelled_log_mel
from kinora.runtime.faces import HELD_OUT_SEED
from kinora.runtime.faces.motion import motion_from_audio
from kinora.runtime.systems.liveavatar_mode import GenerationMode
from kinora.train.speech import synthesise
from kinora.train.tiny import clips as clips_module
from kinora.train.tiny import pool, vae_stage
from kinora.train.tiny.clips import LEAD_IN, SAMPLES_PER_FRAME, SILENT_START, ClipSource
from kinora.train.tiny.dit_stage import TinySystem
from kinora.train.tiny.export import dit_config
from kinora.train.tiny.recipe import SMOKE
from tiny_training import CPU, SPEECH, bank, small


def test_clips_carry_what_belongs_together() -> None:
    recipe = small()
    source = ClipSource(bank(4, 6.0), recipe, CPU, 1)
    batch = source.clips(6, 7, 5)
    frames = recipe.preroll + recipe.clip_frames
    assert batch.video.shape == (6, 3, frames, 32, 32) and batch.still.shape == (6, 3, 1, 32, 32)
    assert batch.features.shape == (6, 2 * recipe.clip_frames + 7 + 5, 40)
    assert batch.first.shape == (6,) and batch.motion.shape == (6, frames)
    assert batch.video.min() >= -1 and batch.video.max() <= 1
    assert batch.motion.openness.max() > 0.2  # the babble opens mouths
    moved = (batch.video - batch.still).abs().amax((1, 2, 3, 4))
    assert (moved > 0.1).any()


def test_the_bank_must_be_long_enough() -> None:
    with pytest.raises(ValueError, match="too short"):
        ClipSource(bank(1, 3.0), small(), CPU, 0)


def test_sources_repeat_and_forks_differ() -> None:
    recipe, speech = small(), bank(4, 6.0)
    first, again = (ClipSource(speech, recipe, CPU, 3).clips(2, 4, 4) for _ in range(2))
    assert torch.equal(first.video, again.video) and torch.equal(first.features, again.features)
    assert not torch.equal(ClipSource(speech, recipe, CPU, 3).fork(4).clips(2, 4, 4).video, first.video)


def test_held_out_identities_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = clips_module.sample_identities
    monkeypatch.setattr(clips_module, "sample_identities", lambda seeds: seen.extend(seeds) or original(seeds))
    speech, recipe = bank(2, 6.0), small()
    ClipSource(speech, recipe, CPU, 0).identities(50)
    assert all(0 <= seed < HELD_OUT_SEED for seed in seen)
    seen.clear()
    held_out = ClipSource(speech, recipe, CPU, 0, held_out=True)
    held_out.identities(20)
    held_out.fork(9).identities(20)
    assert len(seen) == 40 and all(seed >= HELD_OUT_SEED for seed in seen)


def fixed_sound(source: ClipSource, wave: torch.Tensor, first: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a source cut its clips from this wave, unchanged and without added noise."""
    monkeypatch.setattr(source, "sound", lambda count, total: (wave[:, : total * SAMPLES_PER_FRAME], first))
    monkeypatch.setattr(source, "_uniform", lambda *shape: torch.ones(*shape))  # noise comes with a draw below 0.4


@pytest.mark.parametrize(("left", "lookahead"), [(10, 4), (0, 0), (58, 9)])
def test_features_and_motion_stand_at_the_clip(left: int, lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row `left` of the features is the first 20 ms of the clip, the last frame of the motion its last 40 ms."""
    recipe = small()
    source = ClipSource(bank(2, 6.0), recipe, CPU, 0)
    wave = bank(2, 8.0, seed=3).float() / 32768.0
    fixed_sound(source, wave, torch.zeros(2, dtype=torch.bool), monkeypatch)
    batch = source.clips(2, left, lookahead)
    total = LEAD_IN + recipe.preroll + recipe.clip_frames
    heard = wave[:, : total * SAMPLES_PER_FRAME]
    whole, _ = levelled_log_mel(heard)
    clip = 2 * (LEAD_IN + recipe.preroll)
    inside = slice(left, left + 2 * recipe.clip_frames)
    torch.testing.assert_close(batch.features[:, inside], whole[:, clip : 2 * total])
    torch.testing.assert_close(batch.features[:, :left], whole[:, clip - left : clip])
    after = batch.features[:, inside.stop :]
    assert after.shape[1] == lookahead and (after == -1.0).all()  # nothing is heard after the end of the sound
    torch.testing.assert_close(batch.motion.openness, motion_from_audio(heard).openness[:, LEAD_IN:])


def test_the_context_is_the_front_ends() -> None:
    """The features that the training draws give the front end exactly one hidden state a clip frame."""
    recipe = small()
    config = dit_config(recipe, SPEECH)
    system = TinySystem(config, SPEECH)
    batch = ClipSource(bank(2, 6.0), recipe, CPU, 0).clips(2, SPEECH.left_context, SPEECH.lookahead)
    states = to_video_rate(system.speech(batch.features))
    assert states.shape == (2, SPEECH.layers, SPEECH.channels, recipe.clip_frames)


def test_clips_that_start_a_video_start_silent() -> None:
    """Until the frames that the runtime drops are over, nothing is heard and the mouth is shut."""
    recipe = small()
    source = ClipSource(bank(4, 6.0), recipe, CPU, 2)
    wave, first = source.sound(40, LEAD_IN + recipe.preroll + recipe.clip_frames)
    assert 0 < first.sum() < 40
    opens = (LEAD_IN + recipe.preroll + SILENT_START) * SAMPLES_PER_FRAME
    assert not wave[first, :opens].any() and wave[first, opens:].any()
    assert all(clip.any() for clip in wave[~first, :opens])
    assert GenerationMode().lead_frames == SILENT_START


def test_crops_show_the_same_window_of_whole_clips() -> None:
    recipe = small()
    source = ClipSource(bank(4, 6.0), recipe, CPU, 0)
    crops = source.crops(2, 5, 16)
    assert crops.shape == (2, 3, 5, 16, 16)
    whole = ClipSource(bank(4, 6.0), recipe, CPU, 0).videos(2, 5)
    windows = whole.unfold(3, 16, 1).unfold(4, 16, 1)  # [2, 3, 5, rows, columns, 16, 16]
    same = (windows == crops[:, :, :, None, None]).flatten(5).all(-1).all(2).all(1).all(0)
    assert same.any()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs Debian's package espeak-ng")
def test_spoken_clips_move_their_mouths() -> None:
    speech = synthesise(2, 6.0, seed=1)
    batch = ClipSource(speech, small(), CPU, 0).clips(3, SPEECH.left_context, SPEECH.lookahead)
    assert batch.motion.openness.max() > 0.4 and batch.features.max() > 0.5


def fake_pool(size: int) -> pool.LatentPool:
    """A pool whose clips are numbered in the order in which they were drawn."""
    made = pool.LatentPool(None, None, replace(SMOKE, pool=size), 0, 0)  # type: ignore[arg-type]
    numbers = iter(range(10**6))

    def encode(count: int) -> dict[str, torch.Tensor]:
        values = torch.tensor([next(numbers) for _ in range(count)])
        return {"latents": values.half()[:, None], "first": values % 2 == 0}

    made.encode = encode  # type: ignore[method-assign]
    return made


@settings(deadline=None)
@given(st.integers(2, 9), st.lists(st.integers(1, 2), min_size=1, max_size=12))
def test_the_pool_keeps_the_newest_clips(size: int, counts: list[int]) -> None:
    ring = fake_pool(size)
    for count in counts:
        ring.refill(count)
    total = sum(counts)
    assert ring.filled == min(size, total)
    kept = ring.fields["latents"][: ring.filled, 0].int().tolist()
    assert sorted(kept) == list(range(total - ring.filled, total))


def test_batches_come_from_filled_places_and_keep_clips_together() -> None:
    ring = fake_pool(64)
    ring.refill(5)
    batch = ring.draw(200, torch.Generator().manual_seed(0))
    assert batch["latents"].dtype == torch.float32 and batch["first"].dtype == torch.bool
    assert set(batch["latents"][:, 0].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert torch.equal(batch["latents"][:, 0] % 2 == 0, batch["first"])


@torch.no_grad()
def test_the_pool_encodes_pictures_as_the_runtime_does() -> None:
    """Reference and motion latents are those that `BlockStream` computes with the exported mode."""
    recipe = small()
    vae = vae_stage.WanVae(vae_stage.vae_config(recipe)).eval()
    ring = pool.LatentPool(ClipSource(bank(2, 6.0), recipe, CPU, 0), vae, recipe, 4, 4)
    encoded = ring.encode(2)
    frames = recipe.clip_frames // 4
    assert encoded["latents"].shape == (2, 16, frames, 4, 4)
    assert encoded["reference"].shape == (2, 16, 1, 4, 4)
    assert encoded["motion"].shape == (2, 16, vae.config.latent_frames(recipe.still), 4, 4)
    still = ClipSource(bank(2, 6.0), recipe, CPU, 0).clips(2, 4, 4).still
    reference = vae.encode(still.expand(-1, -1, 5, -1, -1))[:, :, 1:2]
    torch.testing.assert_close(encoded["reference"].float(), reference, atol=2e-3, rtol=2e-3)
