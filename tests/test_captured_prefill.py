"""The compiled prefill of the condition against the plain one: every ring format, the re-sink, and what it shares."""

import pytest
import torch
import torch.utils._pytree as pytree
from kinora.graphs.models.liveavatar import LiveAvatar
from kinora.graphs.models.liveavatar_cache import KeyValue
from kinora.graphs.models.liveavatar_memory import Fp8Memory, RingFormat, StreamMemory, store_condition
from kinora.graphs.quantize import quantize_linears
from kinora.graphs.rewrite.recipe import Recipe
from kinora.runtime.placement.captured import CapturedBlock
from small_block import CONFIG, GRID, MODE, error, latents, model
from torch import Tensor

FORMATS = [None, "fp8", "mixed", "joined"]


def conditions(count: int = 2, frames: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(latents(1), latents(frames)) for _ in range(count)]


def stream(dit: LiveAvatar, values: str | None = None, **options: object) -> CapturedBlock:
    ring = RingFormat(dit.dtype, values)  # type: ignore[arg-type]
    return CapturedBlock(dit, torch.linspace(-1, 1, 80).view(5, 16), MODE, GRID, ring=ring, **options)  # type: ignore[arg-type]


def held(memory: StreamMemory) -> list[Tensor]:
    """All that memories keep of a condition: keys, values, scales, reference rows; as numbers."""
    found: list[Tensor] = []
    for layer in (layer for step in memory.layers for layer in step):
        if isinstance(layer, Fp8Memory):
            tensors = [layer.condition.k8, layer.condition.v, layer.condition.v_descale]
        else:
            tensors = [*layer.cache.condition, *(getattr(layer, name, None) for name in ("scale_v", "scales"))]
        found += [t.float().clone() for t in (*tensors, layer.reference) if t is not None]
    return found


def plainly(block: CapturedBlock, given: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The same condition through `LiveAvatar.prefill_layers` into the same memories."""
    reference, motion = (t.to(block.dit.dtype) for t in given)

    def store(layer: int, kept: KeyValue, rope: Tensor) -> None:
        store_condition(block.memory.receiving(layer), kept, rope)

    block.dit.prefill_layers(reference, motion, block.text, store)
    return held(block.memory)


@pytest.mark.parametrize("values", FORMATS)
def test_a_condition_and_the_next_are_those_of_the_plain_prefill(values: str | None) -> None:
    """Float32 layers; what is kept in e4m3 may round to a neighbour."""
    dit = model(torch.float32)
    given = conditions()
    with torch.inference_mode():
        found = stream(dit, values)
        wanted = stream(dit, values)
        for condition in given:
            found.condition(*condition)
            expected = plainly(wanted, condition)
            for one, other in zip(held(found.memory), expected, strict=True):
                assert other.isfinite().all() and error(one, other) < (1e-5 if values is None else 1e-3)
    assert any(t.norm() > 0 for t in expected)


@pytest.mark.parametrize("values", FORMATS)
def test_fp8_layers_stay_close(values: str | None) -> None:
    dit = model(torch.bfloat16)
    quantize_linears(dit, granularity="row")
    (condition,) = conditions(1)
    with torch.inference_mode():
        found, wanted = stream(dit, values), stream(dit, values)
        found.condition(*condition)
        for one, other in zip(held(found.memory), plainly(wanted, condition), strict=True):
            assert error(one, other) < 5e-2


def test_a_stream_keeps_the_scale_of_its_first_condition() -> None:
    """Values of a joined cache: a re-sink that is twice as large does not change how the ring is read."""
    block, (condition,) = stream(model(torch.bfloat16), "joined"), conditions(1)
    scales = [layer.scales for step in block.memory.layers for layer in step]
    with torch.inference_mode():
        block.condition(*condition)
        first = [t.clone() for t in scales]
        block.condition(*(2 * t for t in condition))
        assert all(torch.equal(t, before) for t, before in zip(scales, first, strict=True)) and first[0][2] > 0
        block.begin(torch.linspace(-1, 1, 80).view(5, 16))
        assert not any(t.any() for t in scales)
        block.condition(*(2 * t for t in condition))
        assert not torch.equal(scales[0], first[0])


def test_recording_leaves_nothing_behind() -> None:
    """The warm-up of a recording sees blank latents; the scales that follow from them are not those of the stream."""
    dit, (condition,) = model(torch.bfloat16), conditions(1)
    with torch.inference_mode():
        fresh, used = stream(dit, "joined"), stream(dit, "joined")
        used.condition(latents(1), latents(5))
        used.record()
        with pytest.raises(RuntimeError, match="condition"):
            used.denoise(latents(3), None)  # type: ignore[arg-type]
        for block in (fresh, used):
            block.condition(*condition)
    assert all(torch.equal(*pair) for pair in zip(held(fresh.memory), held(used.memory), strict=True))


@pytest.mark.parametrize("frames", [1, 19, 23])
def test_any_number_of_motion_latents(frames: int) -> None:
    """The newest 19 count and missing ones are zero, whatever an earlier condition left in the static inputs."""
    dit = model(torch.float32)
    with torch.inference_mode():
        found, wanted = stream(dit), stream(dit)
        found.condition(latents(1), latents(19))
        (condition,) = conditions(1, frames)
        found.condition(*condition)
        for one, other in zip(held(found.memory), plainly(wanted, condition), strict=True):
            assert error(one, other) < 1e-5


def test_another_prompt_reaches_the_program() -> None:
    """`begin` writes the prompt's keys and values where the program reads them."""
    dit, (condition,), prompt = model(torch.float32), conditions(1), torch.randn(3, 16)
    with torch.inference_mode():
        found = stream(dit)
        found.condition(*condition)
        before = held(found.memory)
        program = found.prefill.program
        found.begin(prompt)
        found.condition(*condition)
        wanted = plainly(CapturedBlock(dit, prompt, MODE, GRID), condition)
    assert found.prefill.program is program
    for one, other in zip(held(found.memory), wanted, strict=True):
        assert error(one, other) < 1e-5
    assert any(error(one, other) > 1e-3 for one, other in zip(held(found.memory), before, strict=True))


def test_latents_of_another_size_are_refused() -> None:
    block = stream(model(torch.float32))
    wrong = torch.zeros(1, 16, 1, 8, 8)
    for reference, motion in ((wrong, latents(5)), (latents(2), latents(5)), (latents(1), wrong)):
        with pytest.raises(ValueError, match=r"made for \(1, 16, 1, 8, 4\) .*new stream"):
            block.condition(reference, motion)


def test_passes_match_and_the_last_layer_ends_with_its_keys() -> None:
    dit = model(torch.bfloat16)
    quantize_linears(dit, granularity="row")
    with torch.inference_mode():
        program = stream(dit, "joined").prefill.compile()
    matches = {report.name: report.matches for report in program.reports}
    layers = CONFIG.num_layers
    assert matches["concatenate"] == layers
    assert matches["fuse"] == 3 * layers - 3  # of the last layer only the norm before its projections
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    products = 1 + 3 + 2  # q, k and v; o, and q and o of the text; the feed-forward
    assert sum("fp8_matmul" in name for name in calls) == products * (layers - 1) + 1


@pytest.mark.parametrize("recipe", [Recipe(fp8=True), None])
def test_it_shares_the_weights_of_the_step(recipe: Recipe | None) -> None:
    """No weight is held twice: neither joined ones, nor those that the recipe quantised."""
    dit = model(torch.bfloat16)
    with torch.inference_mode():
        block = stream(dit, **({} if recipe is None else {"recipe": recipe}))
        step = block.compile()
        packed = dict(block.packed)
        prefill = block.prefill.compile()
    assert block.packed.keys() == packed.keys() and bool(packed) == (recipe is not None)
    held = (*dit.parameters(), *dit.buffers(), *step.module.buffers(), *pytree.tree_leaves(packed))
    own = {t.untyped_storage().data_ptr() for t in held}
    assert all(t.untyped_storage().data_ptr() in own for t in prefill.module.buffers())
