"""The time-steps of consecutive blocks in one batch against the steps one after another."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.graphs.models.liveavatar_memory import RingFormat
from kinora.graphs.quantize import quantize_linears
from kinora.runtime.placement.batched_steps import BatchedSteps
from kinora.runtime.placement.captured import CapturedBlock
from kinora.runtime.placement.single import SingleDevice
from kinora.runtime.placement.static_stream import BlockShape
from kinora.runtime.systems.liveavatar_mode import GenerationMode
from kinora.runtime.systems.liveavatar_step import BlockInputs
from torch import Tensor

GRID = (8, 4)  # latent rows, columns
CONFIG = LiveAvatarConfig(
    dim=128, ffn_dim=192, num_heads=2, num_layers=2, text_dim=16, text_len=8, audio_dim=32, audio_layers=3,
    audio_inject_layers=(0,),
)  # fmt: skip
MODE = GenerationMode(steps=4, cache_latents=9)  # a ring of three blocks
NEW_CONDITION = 4  # the block before which the condition changes
Block = tuple[Tensor, BlockInputs]


def model(dtype: torch.dtype = torch.float32) -> LiveAvatar:
    torch.manual_seed(0)
    dit = LiveAvatar(CONFIG).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5))
    return dit.to(dtype)


def latents(frames: int) -> Tensor:
    return torch.randn(1, 16, frames, *GRID)


def blocks(count: int, actors: int = 1, pose: bool = False) -> list[Block]:
    mask = None if actors == 1 else torch.rand(actors, 12, GRID[0] // 2, GRID[1] // 2, 1)
    return [
        (
            latents(3),
            BlockInputs(
                i, torch.randn(actors, 3, 32, 12), (5 + i, 9, 30 - i, 4), latents(3) if pose else None, mask
            ),
        )
        for i in range(count)
    ]  # fmt: skip


def conditions() -> list[tuple[Tensor, Tensor]]:
    return [(latents(1), latents(5)) for _ in range(2)]


def in_order(
    denoiser: SingleDevice | CapturedBlock, inputs: Sequence[Block], given: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    denoiser.condition(*given[0])
    made = []
    for x, block in inputs:
        if block.index == NEW_CONDITION:
            denoiser.condition(*given[1])
        made.append(denoiser.denoise(x.to(denoiser.dit.dtype), block))
    return made


def batched(denoiser: BatchedSteps, inputs: Sequence[Block], given: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    denoiser.condition(*given[0])
    made = []
    for x, block in inputs:
        if block.index == NEW_CONDITION:
            denoiser.condition(*given[1])
        made.append(denoiser.denoise(x.to(denoiser.dit.dtype), block))
    assert [found is None for found in made] == [i < MODE.steps - 1 for i in range(len(inputs))]
    return [found for found in made if found is not None] + denoiser.drain()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize(("actors", "pose"), [(1, False), (1, True), (2, False)])
def test_float32_is_the_sequential_stream(actors: int, pose: bool) -> None:
    """Growing and rolling rings, and a condition that changes while blocks are under way."""
    dit, prompt, inputs, given = model(), torch.randn(5, 16), blocks(9, actors, pose), conditions()
    with torch.inference_mode():
        wanted = in_order(SingleDevice(dit, prompt, MODE, GRID), inputs, given)
        shape = BlockShape(actors, masked=actors > 1, pose=pose)
        found = batched(BatchedSteps(dit, prompt, MODE, GRID, shape=shape), inputs, given)
    assert len(found) == len(wanted) == 9
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-5


@pytest.mark.parametrize("values", ["fp8", "mixed", "joined"])
def test_fp8_is_the_captured_block(values: str) -> None:
    dit, prompt, inputs, given = model(torch.bfloat16), torch.randn(5, 16), blocks(5), conditions()
    quantize_linears(dit, granularity="row")
    ring = RingFormat(torch.bfloat16, values)  # type: ignore[arg-type]
    with torch.inference_mode():
        wanted = in_order(CapturedBlock(dit, prompt, MODE, GRID, ring=ring), inputs, given)
        steps = BatchedSteps(dit, prompt, MODE, GRID, ring=ring)
        found = batched(steps, inputs, given)
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-2
    emitted = next(report for report in steps.compile().reports if report.name == "emit")
    joined = sum(line.startswith("cat") for line in emitted.lines)  # the attention of all samples
    assert joined == (CONFIG.num_layers if values == "joined" else 0)


def test_a_stream_shorter_than_the_steps_and_a_second_one() -> None:
    dit, inputs, given = model(), blocks(2), conditions()
    prompts = torch.randn(2, 5, 16)
    with torch.inference_mode():
        fast = BatchedSteps(dit, prompts[0], MODE, GRID)
        batched(fast, blocks(6), given)
        fast.begin(prompts[1])
        found = batched(fast, inputs, given)
        wanted = in_order(SingleDevice(dit, prompts[1], MODE, GRID), inputs, given)
    assert len(found) == 2
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    dit = model()
    inputs = blocks(3)
    with torch.inference_mode():
        fast = BatchedSteps(dit, torch.randn(5, 16), MODE, GRID)
        assert fast.drain() == []
        with pytest.raises(RuntimeError, match="condition"):
            fast.denoise(*inputs[0])
        fast.condition(*conditions()[0])
        fast.denoise(*inputs[0])
        with pytest.raises(ValueError, match="block 2 cannot follow block 0"):
            fast.denoise(*inputs[2])
        x, block = inputs[1]
        with pytest.raises(ValueError, match="actor mask"):
            fast.denoise(x, replace(block, actor_mask=torch.ones(1, 12, GRID[0] // 2, GRID[1] // 2, 1)))
