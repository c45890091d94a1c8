"""Training of the embedded model: its pieces, that its rollout is the runtime's stream, and the documented command."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.models.speech import SpeechConfig, to_video_rate
from kinora.graphs.models.speech_features import levelled_log_mel
from kinora.runtime import load
from kinora.runtime.faces import HELD_OUT_SEED
from kinora.runtime.faces.motion import motion_from_audio
from kinora.runtime.placement.single import SingleDevice
from kinora.runtime.samplers import euler_schedule
from kinora.runtime.systems.liveavatar_mode import GenerationMode
from kinora.runtime.systems.liveavatar_step import BlockInputs
from kinora.train import loop
from kinora.train.speech import synthesise
from kinora.train.tiny import __main__ as command
from kinora.train.tiny import clips as clips_module
from kinora.train.tiny import dit_stage, pool, vae_stage
from kinora.train.tiny.clips import LEAD_IN, SAMPLES_PER_FRAME, SILENT_START, ClipSource
from kinora.train.tiny.dit_stage import Place, TinySystem
from kinora.train.tiny.export import dit_config
from kinora.train.tiny.recipe import FULL, PRESETS, SMOKE, Recipe, Stage

RATE = 16_000
CPU = torch.device("cpu")
SPEECH = SpeechConfig(mels=40, channels=16, layers=3, lookahead=4)


def bank(count: int, seconds: float, seed: int = 0) -> torch.Tensor:
    """Babble int16 [count, samples]: a hummed vowel in syllables of changing pitch and length, so that mouths move."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    waves = []
    for _ in range(count):
        pitch = generator.uniform(90, 220)
        syllables = np.sin(2 * np.pi * generator.uniform(1.5, 4) * time + generator.uniform(0, 6)).clip(0, None)
        voice = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 16))
        waves.append(6000 * syllables * voice / np.abs(voice).max())
    return torch.from_numpy(np.stack(waves).astype(np.int16))


# The stages' arithmetic


def test_learning_rate_warms_up_and_falls_to_the_floor() -> None:
    rates = [loop.warmup_cosine(step, 100, 2.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.04) and loop.warmup_cosine(500, 100, 2.0, 10) == pytest.approx(0.04)
    assert rates[55] == pytest.approx(2.0 * (0.02 + 0.98 / 2))


def test_ema_averages_and_comes_back() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = loop.Ema(module, 0.999)
    torch.nn.init.ones_(module.weight)
    ema.update(module, 0)  # the decay warms up from 1/10
    assert torch.allclose(ema.values["weight"], torch.full((1, 2), 0.9))
    ema.update(module, 10**9)
    assert torch.allclose(ema.values["weight"], torch.full((1, 2), 0.9001))
    assert torch.equal(module.weight.detach(), torch.ones(1, 2))  # watching changes nothing
    ema.copy_to(module)
    assert torch.allclose(module.weight.detach(), torch.full((1, 2), 0.9001))


def test_curves_are_appended_to(tmp_path: Path) -> None:
    loop.Curve(tmp_path / "a" / "loss.jsonl").add(1, loss=0.5)
    loop.Curve(tmp_path / "a" / "loss.jsonl").add(2, loss=torch.tensor(0.25))
    rows = [json.loads(line) for line in (tmp_path / "a" / "loss.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.25)]


def test_a_cut_off_save_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "state.pt"
    assert loop.load_checkpoint(path, CPU) is None
    loop.save_checkpoint(path, {"step": 1})

    def cut_off(state: object, target: Path) -> None:
        Path(target).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.torch, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            loop.save_checkpoint(path, {"step": 2})
    assert loop.load_checkpoint(path, CPU) == {"step": 1}
    loop.save_checkpoint(path, {"step": 3})  # what the cut-off save left is no obstacle
    assert loop.load_checkpoint(path, CPU) == {"step": 3}
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 64))
def test_clips_stand_where_streams_are(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(count, generator=generator) < 0.5
    place = Place.draw(first, generator)
    assert place.frame_offset.dtype == place.ref_shift.dtype == torch.long
    assert not place.frame_offset[first].any() and not place.ref_shift[first].any()
    assert (place.frame_offset % 3 == 0).all() and (place.frame_offset[~first] >= 3).all()
    assert (place.frame_offset <= dit_stage.LONGEST_STREAM).all() and (place.ref_shift >= 0).all()
    ahead = (30 + place.ref_shift - place.frame_offset)[place.ref_shift > 0]  # frames from clip to reference
    low, high = dit_stage.REFERENCE_DISTANCE
    assert ((ahead >= low) & (ahead < high)).all()


def test_places_reach_hours_and_stay_near() -> None:
    place = Place.draw(torch.zeros(4000, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert place.frame_offset.max() > 50_000 and (place.frame_offset < 30).float().mean() > 0.1


def test_noise_levels_are_the_runtimes_and_between() -> None:
    sigmas = euler_schedule(dit_stage.STEPS, 3.0).sigmas.float()
    drawn = dit_stage.draw_sigmas(4000, sigmas, torch.Generator().manual_seed(0))
    own = torch.isin(drawn, sigmas[:-1])
    assert own.float().mean().item() == pytest.approx(dit_stage.SCHEDULE_SHARE, abs=0.05)
    assert set(drawn[own].tolist()) == set(sigmas[:-1].tolist())
    assert ((drawn >= 0) & (drawn <= 1)).all() and drawn[~own].min() < 0.05 and drawn[~own].max() > 0.95


def test_moving_latents_weigh_more() -> None:
    latents = torch.zeros(2, 4, 6, 4, 4)
    latents[0, :, ::2, 1, 2] = 1.0
    weight = dit_stage.moving_weight(latents)
    assert weight.shape == (2, 1, 1, 4, 4)
    assert torch.allclose(weight.mean((-2, -1)), torch.ones(2, 1, 1))
    assert torch.allclose(weight[1], torch.ones(1, 1, 4, 4))  # nothing moves: all count the same
    rest = weight[0, 0, 0, 0, 0]
    assert torch.isclose(weight[0, 0, 0, 1, 2] / rest, torch.tensor(1 + dit_stage.MOVING_WEIGHT))


def test_noised_goes_from_data_to_noise() -> None:
    data, noise = torch.randn(2, 1, 3, 2, 2), torch.randn(2, 1, 3, 2, 2)
    mixed = dit_stage.noised(data, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], data[0]) and torch.equal(mixed[1], noise[1])


# Clips and the pool


def small(**changes) -> Recipe:
    return replace(SMOKE, size=32, **changes)


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


# The rollout of the training is the stream of the runtime


def random_system(recipe: Recipe) -> TinySystem:
    """A system none of whose parts is silent: the start values leave head, injection and masks at zero."""
    system = TinySystem(dit_config(recipe, SPEECH), SPEECH).eval().requires_grad_(False)
    for name, parameter in system.named_parameters():
        if not name.startswith("speech."):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return system


def stream_blocks(
    system: TinySystem, batch: dict[str, torch.Tensor], noise: torch.Tensor, shift: int, steps: int, first_block: int
) -> torch.Tensor:
    """One clip through the runtime's own steps, block by block from block `first_block` of a video."""
    config = system.dit.config
    mode = GenerationMode(cache_latents=config.cache_frames)
    device = SingleDevice(
        system.dit, torch.zeros(1, config.text_dim), mode, tuple(noise.shape[-2:]), steps=range(steps)
    )  # fmt: skip
    device.condition(batch["reference"], batch["motion"])
    features = to_video_rate(system.speech(batch["features"]))  # [1, K, C, frames]
    done = []
    for block in range(noise.shape[2] // 3):
        index = first_block + block
        distance = shift + 30 - 3 * index  # what makes `ref_shift` the clip's own
        sound = features[..., 12 * block : 12 * (block + 1)]
        done.append(
            device.denoise(noise[:, :, 3 * block : 3 * block + 3], BlockInputs(index, sound, (distance,) * mode.steps))
        )
    return torch.cat(done, 2)


@torch.no_grad()
@pytest.mark.parametrize(("blocks", "shift"), [(4, 0), (4, 7), (6, 13)])
def test_the_rollout_is_the_runtimes_stream(blocks: int, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, noise and reference: all blocks at once equal block by block; six wrap the ring of four."""
    recipe = replace(SMOKE, blocks=blocks)
    system = random_system(recipe)
    latents = torch.randn(2, 16, 3 * blocks, 4, 6)
    batch = {
        "latents": latents,
        "reference": torch.randn(2, 16, 1, 4, 6),
        "motion": torch.randn(2, 16, 5, 4, 6),
        "features": torch.rand(2, 24 * blocks + SPEECH.left_context + SPEECH.lookahead, SPEECH.mels) * 2 - 1,
    }
    noise = torch.randn_like(latents)
    monkeypatch.setattr(dit_stage.torch, "randn_like", lambda _: noise.clone())
    place = Place(torch.zeros(2, dtype=torch.long), torch.full((2,), shift))
    sigmas = euler_schedule(dit_stage.STEPS, 3.0).sigmas.float()
    for steps in (1, dit_stage.STEPS):
        rolled = dit_stage.roll_out(system, batch, place, sigmas, steps)
        for clip in range(2):
            own = {name: value[clip : clip + 1] for name, value in batch.items()}
            streamed = stream_blocks(system, own, noise[clip : clip + 1], shift, steps, 0)
            torch.testing.assert_close(rolled[clip : clip + 1], streamed, atol=3e-4, rtol=3e-4)
    moved = dit_stage.roll_out(system, batch, Place(place.frame_offset, place.ref_shift + 9), sigmas, steps)
    assert (moved - rolled).abs().max() > 1e-2  # the reference's place matters, so the agreement above says something


@torch.no_grad()
def test_a_clip_may_stand_anywhere_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block in the middle of a video: rotary positions are the runtime's there too."""
    system = random_system(SMOKE)
    system.dit.config = replace(system.dit.config, cache_frames=3)  # no history, as the training clip has none
    shape = (1, 16, 3, 4, 4)
    batch = {
        "latents": torch.zeros(shape),
        "reference": torch.randn(1, 16, 1, 4, 4),
        "motion": torch.randn(1, 16, 5, 4, 4),
        "features": torch.rand(1, 24 + SPEECH.left_context + SPEECH.lookahead, SPEECH.mels) * 2 - 1,
    }
    noise = torch.randn(shape)
    monkeypatch.setattr(dit_stage.torch, "randn_like", lambda _: noise.clone())
    sigmas = euler_schedule(dit_stage.STEPS, 3.0).sigmas.float()
    rolled = {
        offset: dit_stage.roll_out(
            system, batch, Place(torch.tensor([offset]), torch.tensor([offset - 20])), sigmas, dit_stage.STEPS
        )
        for offset in (300, 3000)
    }
    for offset, made in rolled.items():
        streamed = stream_blocks(system, batch, noise, offset - 20, dit_stage.STEPS, offset // 3)
        torch.testing.assert_close(made, streamed, atol=3e-4, rtol=3e-4)
    assert (rolled[300] - rolled[3000]).abs().max() > 1e-3


# The VAE's stage


def test_pieces_open_with_17_frames_and_go_on_with_16() -> None:
    recipe = small(vae_pieces=3, vae_crop=16)
    stream = vae_stage.pieces(ClipSource(bank(2, 6.0), recipe, CPU, 0), recipe)
    drawn = [next(stream) for _ in range(6)]
    assert [opens for opens, _ in drawn] == [True, False, False] * 2
    assert [video.shape[2] for _, video in drawn] == [17, 16, 16] * 2
    assert recipe.vae_frames == 49


def test_the_vaes_loss_counts_motion_and_the_first_frame() -> None:
    video = torch.zeros(1, 3, 5, 32, 32)
    video[:, :, 2, 4, 4] = 1.0
    assert vae_stage.reconstruction_loss(video, video, True) == 0

    def off_by(frame: int, row: int, opens: bool) -> float:
        decoded = video.clone()
        decoded[:, :, frame, row, 4] += 0.5
        return float(vae_stage.reconstruction_loss(decoded, video, opens))

    assert off_by(2, 4, False) > off_by(3, 4, False)  # the pixel that moves, when it moves
    assert off_by(0, 2, True) > off_by(0, 2, False) == pytest.approx(off_by(1, 2, False))


@torch.no_grad()
def test_latents_are_normalised_with_measured_statistics() -> None:
    vae = vae_stage.WanVae(vae_stage.vae_config(small())).eval()
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    latents = vae_stage.with_statistics(vae, video).encode(video)
    assert torch.allclose(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3)


# The documented command

QUICK = replace(
    SMOKE,
    size=32,
    vae_crop=16,
    blocks=1,
    pool=4,
    vae=Stage(steps=4, batch=1, rate=1e-3, warmup=1, report_every=1, save_every=2),
    flow=Stage(steps=4, batch=2, rate=1e-3, warmup=1, report_every=1, save_every=2),
    rollout=Stage(steps=2, batch=2, rate=5e-4, warmup=1, report_every=1, save_every=1),
)


def prepared(folder: Path, recipe: Recipe) -> list[str]:
    """A run folder that has its speech already, so that no espeak-ng is needed; the command's arguments for it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(bank(recipe.utterances, recipe.utterance_seconds, 1), folder / "speech-train.pt")
    torch.save(bank(recipe.utterances, recipe.utterance_seconds, 2), folder / "speech-test.pt")
    return ["--out", str(folder), "--preset", "smoke", "--device", "cpu"]


def curve(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_exported(folder: Path, side: int) -> None:
    """The folder is a model that the runtime loads and that makes frames."""
    avatar = load(folder, device="cpu")
    assert avatar.size == side
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    frames = avatar.generate(picture, bank(1, 0.3)[0].float().numpy() / 32768).frames
    assert frames.shape == (8, side, side, 3) and frames.std() > 0


@pytest.mark.parametrize("preset", list(PRESETS))
def test_recipes_fit_together(preset: str) -> None:
    recipe = PRESETS[preset]
    assert recipe.size % 16 == 0 and recipe.vae_crop <= recipe.size and recipe.dim % recipe.heads == 0
    assert recipe.utterance_seconds * 25 >= LEAD_IN + max(recipe.preroll + recipe.clip_frames, recipe.vae_frames) + 2
    assert max(recipe.flow.batch, recipe.rollout.batch) <= recipe.pool and recipe.pool % recipe.refill == 0
    assert FULL.size in range(192, 257)


def test_the_smoke_run_trains_and_exports(tmp_path: Path) -> None:
    """`python -m kinora.train.tiny --out DIR --preset smoke --device cpu`, from nothing to a model that generates."""
    assert command.main(prepared(tmp_path / "run", SMOKE)) == 0
    vae, dit = curve(tmp_path / "run" / "vae.jsonl"), curve(tmp_path / "run" / "dit.jsonl")
    assert [row["step"] for row in vae] == [2, 4, 6]
    assert [row["step"] for row in dit if "flow" in row] == [2, 4, 6]
    assert [row["step"] for row in dit if "rollout" in row] == [8, 10]
    assert [row["step"] for row in dit if "mouth_correlation" in row] == [3, 6, 8, 10]
    assert all(math.isfinite(value) for row in vae + dit for value in row.values())
    assert (tmp_path / "run" / "validation.png").is_file()
    check_exported(tmp_path / "run" / "tiny", SMOKE.size)


class CutOff(Exception):
    """Stands for the machine that goes away."""


@pytest.mark.parametrize(
    ("stage", "saves"), [("vae_stage", 1), ("dit_stage", 1), ("dit_stage", 3)], ids=["vae", "flow", "rollout"]
)
def test_a_cut_off_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, saves: int) -> None:
    """Cut off right after a checkpoint, a rerun goes on from it, repeats nothing that was saved and finishes."""
    monkeypatch.setitem(command.PRESETS, "smoke", QUICK)
    arguments = prepared(tmp_path, QUICK)
    module = {"vae_stage": vae_stage, "dit_stage": dit_stage}[stage]
    left = [saves]

    def save_then_stop(path: Path, state: dict) -> None:
        loop.save_checkpoint(path, state)
        left[0] -= 1
        if not left[0]:
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", save_then_stop)
        with pytest.raises(CutOff):
            command.main(arguments)
    assert not (tmp_path / "tiny").exists()
    assert command.main(arguments) == 0
    vae, dit = curve(tmp_path / "vae.jsonl"), curve(tmp_path / "dit.jsonl")
    assert [row["step"] for row in vae] == [1, 2, 3, 4]
    trained = [(row["step"], name) for row in dit for name in ("flow", "rollout") if name in row]
    assert trained == [(1, "flow"), (2, "flow"), (3, "flow"), (4, "flow"), (5, "rollout"), (6, "rollout")]
    check_exported(tmp_path / "tiny", QUICK.size)


def test_a_finished_run_only_exports_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained anew, and the same weights come out."""
    monkeypatch.setitem(command.PRESETS, "smoke", QUICK)
    arguments = prepared(tmp_path, QUICK)
    assert command.main(arguments) == 0
    curves = {name: (tmp_path / name).read_text() for name in ("vae.jsonl", "dit.jsonl")}
    weights = (tmp_path / "tiny" / "tiny.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "tiny")
    assert command.main(arguments) == 0
    assert {name: (tmp_path / name).read_text() for name in curves} == curves
    assert (tmp_path / "tiny" / "tiny.safetensors").read_bytes() == weights


def test_speech_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []

    def speak(count: int, seconds: float, *, seed: int, split: str) -> torch.Tensor:
        made.append((count, seconds, seed, split))
        return bank(count, seconds, seed)

    monkeypatch.setattr(command, "synthesise", speak)
    first = command.speech_bank(SMOKE, tmp_path / "run", 5, "train", 3)
    assert torch.equal(command.speech_bank(SMOKE, tmp_path / "run", 5, "train", 3), first)
    assert made == [(3, SMOKE.utterance_seconds, 5, "train")]


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs Debian's package espeak-ng")
def test_spoken_clips_move_their_mouths() -> None:
    speech = synthesise(2, 6.0, seed=1)
    batch = ClipSource(speech, small(), CPU, 0).clips(3, SPEECH.left_context, SPEECH.lookahead)
    assert batch.motion.openness.max() > 0.4 and batch.features.max() > 0.5


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--preset", "huge", "--out", "run"])
    assert "full" in capsys.readouterr().err
