"""Training of the embedded model: the stages of the DiT, whose rollout is the runtime's stream."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.models.speech import to_video_rate
from kinora.runtime.placement.single import SingleDevice
from kinora.runtime.samplers import euler_schedule
from kinora.runtime.systems.liveavatar_mode import GenerationMode
from kinora.runtime.systems.liveavatar_step import BlockInputs
from kinora.train.tiny import dit_stage
from kinora.train.tiny.dit_stage import Place, TinySystem
from kinora.train.tiny.export import dit_config
from kinora.train.tiny.recipe import SMOKE, Recipe
from tiny_training import SPEECH


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


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_the_rollouts_loss_is_that_of_the_clean_clip_at_the_first_three_steps(wrong: float) -> None:
    """A system that knows the clip has none at any step; of another clip it has that clip's distance."""
    sigmas = euler_schedule(dit_stage.STEPS, 3.0).sigmas.float()
    batch = {"latents": torch.randn(2, 4, 3, 2, 2)}
    place = Place(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    level, levels = [0.0], set()

    def knowing(x: torch.Tensor, sigma: torch.Tensor, *_: object) -> torch.Tensor:
        level[0] = sigma[0].item()
        return (x - batch["latents"] - wrong) / sigma[:, None, None, None, None]

    for seed in range(20):
        loss = dit_stage.rollout_loss(knowing, batch, place, sigmas, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(loss.item(), wrong**2 / (level[0] ** 2 + 0.05), rtol=1e-4, atol=1e-6)
        levels.add(level[0])
    assert levels == set(sigmas[: dit_stage.STEPS - 1].tolist())


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
