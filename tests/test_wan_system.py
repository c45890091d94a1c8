"""Plain Wan generation: seeds, experts, guidance, picture sizes, every wrong input; no weights needed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.models.wan_vae import WAN21_VAE, WanVae
from kinora.runtime.errors import InputError
from kinora.runtime.systems.wan import WAN22_T2V_A14B, WanSettings, WanVideo, image_to_unit_range, size_for_image
from PIL import Image

PROMPTS = (torch.full((2, 3), 1.0), torch.full((4, 3), -1.0))
FAST = WanSettings(steps=3, guidance=(2.0, 2.0))


def vae() -> WanVae:
    torch.manual_seed(0)
    return WanVae(replace(WAN21_VAE, dim=4))


def constant(value: float, seen: list[float] | None = None):
    """A denoiser whose flow is `value` times the sign of its context."""

    def model(x, t, context, y=None, clip_features=None):
        if seen is not None:
            seen.append(float(t))
        return [torch.full_like(x[0], value) * context[0].mean()]

    return model


def test_seeds_reproduce_and_differ() -> None:
    pipeline = WanVideo(constant(0.1), vae())
    first, again, other = (
        pipeline.text_to_video(*PROMPTS, size=(32, 16), frames=5, settings=FAST, seed=seed) for seed in (7, 7, 8)
    )
    assert first.shape == (3, 5, 16, 32)
    assert first.abs().max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_constant_flow_is_integrated_exactly(solver: str) -> None:
    """With v constant the flow ODE is a straight line: x = noise - sigma_0 * guided v, whatever the solver."""
    pipeline = WanVideo(constant(0.5), vae())
    chosen = WanSettings(steps=4, guidance=(3.0, 0.0), solver=solver)
    noise = torch.randn(16, 1, 2, 2)
    guided = -0.5 + 3.0 * (0.5 + 0.5)
    start = chosen.new_solver().schedule.sigmas[0]
    torch.testing.assert_close(pipeline.sample(noise, PROMPTS, chosen), noise - start * guided, rtol=1e-4, atol=1e-4)


def test_experts_split_at_the_boundary() -> None:
    low: list[float] = []
    high: list[float] = []
    pipeline = WanVideo(constant(0.1, low), vae(), high_noise=constant(0.2, high))
    pipeline.sample(torch.zeros(16, 1, 2, 2), PROMPTS, replace(WAN22_T2V_A14B, steps=8))
    assert low
    assert high
    assert max(low) < 875 <= min(high)
    assert len(low) + len(high) == 2 * 8


def test_picture_conditions_the_first_frame_only() -> None:
    pipeline, seen = WanVideo(constant(0.1), vae()), {}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 38, 3), np.uint8))
    condition = pipeline.image_condition(image_to_unit_range(picture), 9, 16, 32)
    assert condition.y.shape == (20, 3, 2, 4)
    assert torch.equal(condition.y[:4].flatten(2).sum(2), torch.tensor([[8.0, 0.0, 0.0]] * 4))
    assert condition.clip_features is None

    def model(x, t, context, y=None, clip_features=None):
        seen["y"] = y[0]
        return x

    video = WanVideo(model, vae()).image_to_video(picture, *PROMPTS, max_area=1024, frames=9, settings=FAST, seed=1)
    assert video.shape[:2] == (3, 9)
    assert torch.equal(
        seen["y"],
        WanVideo(model, vae()).image_condition(image_to_unit_range(picture), 9, video.shape[2], video.shape[3]).y,
    )


def test_transparent_and_grey_pictures_are_read() -> None:
    for mode in ("RGBA", "L", "P"):
        assert image_to_unit_range(Image.new(mode, (5, 4))).shape == (3, 4, 5)


@settings(max_examples=50, deadline=None)
@given(st.integers(64, 4000), st.integers(64, 4000), st.integers(64 * 64, 1280 * 720))
def test_size_for_image_fits_the_area(rows: int, columns: int, area: int) -> None:
    if max(rows, columns) > 8 * min(rows, columns):
        return
    height, width = size_for_image(rows, columns, area)
    assert height % 16 == width % 16 == 0
    assert 0 < height * width <= area * 1.0001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (40, 32)}, "multiples of 16"),
        ({"frames": 6}, "plus 1"),
        ({"noise": torch.zeros(16, 1, 2, 2)}, "this video needs"),
        ({"settings": replace(FAST, solver="heun")}, "choose 'unipc' or 'dpm\\+\\+'"),
        ({"settings": WAN22_T2V_A14B}, "two experts"),
    ],
)
def test_wrong_requests_are_named(change: dict, message: str) -> None:
    arguments = {"size": (32, 32), "frames": 5, "settings": FAST, "seed": 0} | change
    with pytest.raises(InputError, match=message):
        WanVideo(constant(0.1), vae()).text_to_video(*PROMPTS, **arguments)


def test_wrong_prompts_and_pictures_are_named() -> None:
    pipeline = WanVideo(constant(0.1), vae())
    with pytest.raises(InputError, match="no text encoder"):
        pipeline.text_to_video("a face", size=(32, 32))
    with pytest.raises(InputError, match="both prompts"):
        pipeline.text_to_video(PROMPTS[0], "blurry", size=(32, 32))
    with pytest.raises(InputError, match="uint8 RGB"):
        pipeline.image_to_video(np.zeros((4, 4)), *PROMPTS)
    with pytest.raises(InputError, match="too narrow"):
        size_for_image(4000, 10, 64 * 64)
