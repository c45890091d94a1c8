"""The time-steps of consecutive blocks in one batch against the steps one after another."""

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import small_block
import torch
from kinora.graphs.models.liveavatar import LiveAvatar
from kinora.graphs.models.liveavatar_memory import RingFormat
from kinora.graphs.quantize import quantize_linears
from kinora.runtime.placement.batched_steps import BatchedSteps
from kinora.runtime.placement.captured import CapturedBlock
from kinora.runtime.placement.single import SingleDevice
from kinora.runtime.placement.static_stream import BlockShape
from kinora.runtime.systems.liveavatar_mode import GenerationMode
from kinora.runtime.systems.liveavatar_step import BlockInputs
from small_block import GRID, error, latents
from torch import Tensor

CONFIG = replace(small_block.CONFIG, num_layers=2, audio_inject_layers=(0,))
EXACT = 1e-5  # relative L2, of float32
MODE = GenerationMode(steps=4, cache_latents=9)  # a ring of three blocks
Block = tuple[Tensor, BlockInputs]
Conditions = dict[int, tuple[Tensor, Tensor]]  # (reference, motion) by the number of the block before which it changes


def model(dtype: torch.dtype = torch.float32) -> LiveAvatar:
    return small_block.model(dtype, CONFIG)


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


def conditions(*before: int) -> Conditions:
    """A random one before each of these blocks."""
    return {index: (latents(1), latents(5)) for index in before}


def in_order(denoiser: SingleDevice | CapturedBlock, inputs: Sequence[Block], given: Conditions) -> list[Tensor]:
    made = []
    for x, block in inputs:
        if block.index in given:
            denoiser.condition(*given[block.index])
        made.append(denoiser.denoise(x.to(denoiser.dit.dtype), block))
    return made


def batched(denoiser: BatchedSteps, inputs: Sequence[Block], given: Conditions, stops: int = -1) -> list[Tensor]:
    """Drained before block `stops` and at the end."""
    made: list[Tensor | None] = []
    for x, block in inputs:
        if block.index == stops:
            made += denoiser.drain()
        if block.index in given:
            denoiser.condition(*given[block.index])
        made.append(denoiser.denoise(x.to(denoiser.dit.dtype), block))
    if stops < 0:
        assert [found is None for found in made] == [i < denoiser.batch - 1 for i in range(len(inputs))]
    return [found for found in [*made, *denoiser.drain()] if found is not None]


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest error of them; NaN if one is."""
    return float(torch.tensor([error(*pair) for pair in zip(found, wanted, strict=True)]).max())


@pytest.mark.parametrize(("actors", "pose"), [(1, False), (1, True), (2, False)])
def test_float32_is_the_sequential_stream(actors: int, pose: bool) -> None:
    """Growing and rolling rings, and a condition that changes while blocks are on their way."""
    dit, prompt, inputs, given = model(), torch.randn(5, 16), blocks(9, actors, pose), conditions(0, 4)
    with torch.inference_mode():
        wanted = in_order(SingleDevice(dit, prompt, MODE, GRID), inputs, given)
        shape = BlockShape(actors, masked=actors > 1, pose=pose)
        found = batched(BatchedSteps(dit, prompt, MODE, GRID, shape=shape), inputs, given)
    assert worst(found, wanted) < EXACT and len(found) == 9


@pytest.mark.parametrize("stops", [1, 2, 5, 6])
def test_a_drained_stream_goes_on(stops: int) -> None:
    """While it computes without a block, nothing is written over that a later block attends."""
    dit, prompt, inputs, given = model(), torch.randn(5, 16), blocks(10), conditions(0, stops, 7)
    with torch.inference_mode():
        wanted = in_order(SingleDevice(dit, prompt, MODE, GRID), inputs, given)
        assert worst(batched(BatchedSteps(dit, prompt, MODE, GRID), inputs, given, stops), wanted) < EXACT


@pytest.mark.parametrize("values", [None, "fp8", "mixed", "joined"])
def test_conditions_on_their_way_do_not_meet(values: str | None) -> None:
    """One a block, each handed on from step to step, with the scales that the stream's first one set."""
    dit, prompt, inputs, given = model(), torch.randn(5, 16), blocks(7), conditions(0, 2, 3, 4)
    ring = RingFormat(torch.float32, values)  # type: ignore[arg-type]
    with torch.inference_mode():
        wanted = in_order(CapturedBlock(dit, prompt, MODE, GRID, ring=ring), inputs, given)
        steps = BatchedSteps(dit, prompt, MODE, GRID, ring=ring)
        found = batched(steps, inputs, given)
    assert worst(found, wanted) < (EXACT if values is None else 5e-3)  # e4m3 may round to a neighbour


@pytest.mark.parametrize("values", [None, "fp8", "mixed", "joined"])
def test_a_condition_is_handed_on_whole_and_to_one_step(values: str | None) -> None:
    ring = RingFormat(torch.float32, values)  # type: ignore[arg-type]
    with torch.inference_mode():
        memory = BatchedSteps(model(), torch.randn(5, 16), MODE, GRID, ring=ring).memory
        for step, memories in enumerate(memory.layers):
            for kept in (t for layer in memories for t in layer.of_condition()):
                kept.fill_(step + 1)
        memory.hand_on(1)
        held = [
            {float(t.float().mean()) for layer in memories for t in layer.of_condition()} for memories in memory.layers
        ]
    assert held == [{1.0}, {2.0}, {2.0}, {4.0}]


def test_one_step_finishes_at_once() -> None:
    dit, prompt, inputs, given = model(), torch.randn(5, 16), blocks(4), conditions(0, 2)
    mode = GenerationMode(steps=1, cache_latents=9)
    with torch.inference_mode():
        wanted = in_order(SingleDevice(dit, prompt, mode, GRID), inputs, given)
        assert worst(batched(BatchedSteps(dit, prompt, mode, GRID), inputs, given), wanted) < EXACT


@pytest.mark.parametrize("values", ["fp8", "mixed", "joined"])
def test_fp8_is_the_captured_block(values: str) -> None:
    dit, prompt, inputs, given = model(torch.bfloat16), torch.randn(5, 16), blocks(5), conditions(0, 4)
    quantize_linears(dit, granularity="row")
    ring = RingFormat(torch.bfloat16, values)  # type: ignore[arg-type]
    with torch.inference_mode():
        wanted = in_order(CapturedBlock(dit, prompt, MODE, GRID, ring=ring), inputs, given)
        steps = BatchedSteps(dit, prompt, MODE, GRID, ring=ring)
        assert worst(batched(steps, inputs, given), wanted) < 2e-2  # on an H100 products of other heights: 1.1e-2
    emitted = next(report for report in steps.compile().reports if report.name == "emit")
    joined = sum(line.startswith("cat") for line in emitted.lines)  # the attention of all samples
    assert joined == (CONFIG.num_layers if values == "joined" else 0)
    text = sum(line.startswith("attention_joined") for line in emitted.lines)  # all samples are one of many queries
    assert text == joined


def test_a_stream_shorter_than_the_steps_and_a_second_one() -> None:
    """The first one ends with blocks on their way and a condition that has not reached every step."""
    dit, inputs, given = model(), blocks(2), conditions(0)
    prompts = torch.randn(2, 5, 16)
    with torch.inference_mode():
        fast = BatchedSteps(dit, prompts[0], MODE, GRID)
        fast.record()
        for x, block in blocks(6):
            fast.condition(latents(1), latents(5))
            fast.denoise(x, block)
        program, prefill = fast.program, fast.prefill.program
        fast.begin(prompts[1])
        found = batched(fast, inputs, given)
        wanted = in_order(SingleDevice(dit, prompts[1], MODE, GRID), inputs, given)
    assert worst(found, wanted) < EXACT and len(found) == 2
    assert fast.program is program and fast.prefill.program is prefill is not None


def test_what_does_not_fit_is_refused() -> None:
    dit = model()
    inputs = blocks(3)
    with torch.inference_mode():
        fast = BatchedSteps(dit, torch.randn(5, 16), MODE, GRID)
        assert fast.drain() == []
        with pytest.raises(RuntimeError, match="condition"):
            fast.denoise(*inputs[0])
        fast.condition(*conditions(0)[0])
        fast.denoise(*inputs[0])
        with pytest.raises(ValueError, match="block 2 cannot follow block 0"):
            fast.denoise(*inputs[2])
        x, block = inputs[1]
        with pytest.raises(ValueError, match=r"actor mask.*drain"):
            fast.denoise(x, replace(block, actor_mask=torch.ones(1, 12, GRID[0] // 2, GRID[1] // 2, 1)))
        with pytest.raises(ValueError, match=r"pose.*new stream"):
            fast.denoise(x, replace(block, pose=latents(3)))
        assert fast.denoise(*inputs[1]) is None and len(fast.drain()) == 2  # a refused block changed nothing
        shared = CapturedBlock(dit, torch.randn(5, 16), MODE, GRID).memory
        with pytest.raises(ValueError, match="own_conditions"):
            shared.hand_on(0)


@pytest.mark.parametrize("kind", [CapturedBlock, BatchedSteps])
def test_buffers_go_with_the_stream(kind: type[CapturedBlock] | type[BatchedSteps]) -> None:
    """No cycle of references keeps them until the garbage collector comes, which counts objects and not gigabytes."""
    dit, inputs, given = model(), blocks(1), conditions(0)
    for _ in range(2):  # the first trace of a process leaves frames behind
        gc.collect()
        gc.disable()
        try:
            stream = kind(dit, torch.randn(5, 16), MODE, GRID)
            with torch.inference_mode():
                stream.condition(*given[0])
                stream.denoise(*inputs[0])
            buffers = [weakref.ref(t) for t in (stream.static.x, stream.memory.layers[0][0].cache.k)]
            del stream
            alive = [buffer() is not None for buffer in buffers]
        finally:
            gc.enable()
    assert not any(alive)


class Flaky:
    """Fails at the calls of these numbers, then goes on."""

    def __init__(self, replay: Callable[[], None], *fails: int):
        self.replay, self.fails, self.calls = replay, fails, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.fails:
            raise RuntimeError("this time it fails")
        self.replay()


def again(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except RuntimeError as error:
        assert str(error) == "this time it fails"
        return again(act)


@pytest.mark.parametrize("fails", [(0,), (2,), (4,), (5,), (6, 7), (7,)], ids=str)
def test_a_tick_that_fails_can_be_made_again(fails: tuple[int, ...]) -> None:
    """Five blocks, then three ticks that drain: calls 0-4 enter blocks, the others drain."""
    dit, prompt, inputs, given = model(), torch.randn(5, 16), blocks(5, pose=True), conditions(0, 2)
    with torch.inference_mode():
        steps = [BatchedSteps(dit, prompt, MODE, GRID, shape=BlockShape(pose=True)) for _ in range(2)]
        wanted = batched(steps[0], inputs, given)
        steps[1].replay = Flaky(steps[1].replay, *fails)  # type: ignore[assignment]
        found: list[Tensor | None] = []
        for x, block in inputs:
            if block.index in given:
                steps[1].condition(*given[block.index])
            found.append(again(partial(steps[1].denoise, x, block)))
        found += again(steps[1].drain)
    made = [latents for latents in found if latents is not None]
    assert len(made) == len(wanted) and all(map(torch.equal, made, wanted))
