"""The compiled block against the plain steps: growing and rolling ring, conditions, poses, several speakers, FP8."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kinora.graphs.joined_weights import joined_view
from kinora.graphs.models.liveavatar import LiveAvatar
from kinora.graphs.models.liveavatar_memory import RingFormat
from kinora.graphs.quantize import quantize_linears
from kinora.graphs.rewrite.recipe import NothingMatched, Recipe
from kinora.runtime.placement.captured import CapturedBlock
from kinora.runtime.placement.single import SingleDevice
from kinora.runtime.placement.static_stream import BlockShape
from kinora.runtime.systems.liveavatar_step import BlockInputs
from small_block import CONFIG, GRID, MODE, blocks, error, model, run
from torch import Tensor


def both(dit: LiveAvatar, inputs: Sequence[tuple[Tensor, BlockInputs]], **options: object) -> tuple[Tensor, Tensor]:
    prompt = torch.randn(5, 16)
    plain = SingleDevice(dit, prompt, MODE, GRID)
    compiled = CapturedBlock(dit, prompt, MODE, GRID, **options)  # type: ignore[arg-type]
    with torch.inference_mode():
        return run(compiled, inputs, dit), run(plain, inputs, dit)


@pytest.mark.parametrize(("actors", "pose"), [(1, False), (1, True), (2, False)])
def test_float32_is_the_plain_stream(actors: int, pose: bool) -> None:
    dit = model(torch.float32)
    shape = BlockShape(actors, masked=actors > 1, pose=pose)
    found, wanted = both(dit, blocks(7, actors, pose), shape=shape)
    assert error(found, wanted) < 1e-5


def test_bfloat16_keeps_every_rounding_point() -> None:
    found, wanted = both(model(torch.bfloat16), blocks(4))
    assert error(found, wanted) < 2e-3  # the caches join their segments in another order


@pytest.mark.parametrize("values", ["fp8", "mixed", "joined"])
def test_fp8_caches_and_layers_stay_close(values: str) -> None:
    dit = model(torch.bfloat16)
    quantize_linears(dit, granularity="row")
    found, wanted = both(dit, blocks(5), ring=RingFormat(torch.bfloat16, values))  # type: ignore[arg-type]
    assert 0 < error(found, wanted) < 5e-2


def test_a_joined_cache_hands_e4m3_to_the_next_product() -> None:
    """Its attention rounds to e4m3 itself: nothing is quantised again, and nothing changes but that."""
    dit = model(torch.bfloat16)
    quantize_linears(dit, granularity="row")
    inputs, ring = blocks(4), RingFormat(torch.bfloat16, "joined")
    emitting = CapturedBlock(dit, torch.ones(5, 16), MODE, GRID, ring=ring)
    plain = CapturedBlock(dit, torch.ones(5, 16), MODE, GRID, ring=ring, recipe=Recipe(emit=False))
    with torch.inference_mode():
        found, wanted = run(emitting, inputs, dit), run(plain, inputs, dit)
    assert emitting.program is not None
    made = next(report for report in emitting.program.reports if report.name == "emit")
    assert sum("attention_joined" in line for line in made.lines) == 2 * CONFIG.num_layers  # to itself, to the text
    assert error(found, wanted) < 3e-2
    targets = [str(node.target) for node in emitting.program.graph.nodes]
    assert targets.count("kinora.head_norm_fp8.default") == CONFIG.num_layers
    before = [str(node.target) for node in plain.program.graph.nodes]  # type: ignore[union-attr]
    assert sum("quantize_rows" in name for name in targets) < sum("quantize_rows" in name for name in before)


def test_the_compiler_quantises_like_the_model() -> None:
    """A recipe with `fp8` gives what a model whose layers were swapped before gives."""
    inputs = blocks(3)
    dit = model(torch.bfloat16)
    compiled = CapturedBlock(dit, torch.ones(5, 16), MODE, GRID, recipe=Recipe(fp8=True, expect=("quantise", "emit")))
    quantised = model(torch.bfloat16)
    quantize_linears(quantised, granularity="row")
    ring = RingFormat(torch.bfloat16, None)
    with torch.inference_mode():
        found = run(compiled, inputs, dit)
        wanted = run(CapturedBlock(quantised, torch.ones(5, 16), MODE, GRID, ring=ring), inputs, quantised)
    assert error(found, wanted) < 5e-2  # audio, text and condition are quantised in the second only


def test_passes_report_and_missing_matches_are_errors() -> None:
    dit = model(torch.float32)
    compiled = CapturedBlock(dit, torch.randn(5, 16), MODE, GRID)
    with torch.inference_mode():
        run(compiled, blocks(1), dit)
    assert compiled.program is not None
    matches = {report.name: report.matches for report in compiled.program.reports}
    assert matches["concatenate"] == CONFIG.num_layers
    # two inside a block, one behind it, one behind the injection of audio
    assert matches["fuse"] == 3 * CONFIG.num_layers + len(CONFIG.audio_inject_layers)
    with pytest.raises(NothingMatched, match="emit"), torch.inference_mode():
        run(CapturedBlock(dit, torch.randn(5, 16), MODE, GRID, recipe=Recipe(expect=("emit",))), blocks(1), dit)


def test_another_shape_needs_a_new_stream() -> None:
    dit = model(torch.float32)
    compiled = CapturedBlock(dit, torch.randn(5, 16), MODE, GRID)
    with torch.inference_mode():
        run(compiled, blocks(1), dit)
        with pytest.raises(ValueError, match=r"pose .*new stream"):
            compiled.denoise(*blocks(1, pose=True)[0])
        x, block = blocks(1)[0]
        with pytest.raises(ValueError, match=r"actor mask .*new stream"):
            compiled.denoise(x, replace(block, actor_mask=torch.ones(1, 12, GRID[0] // 2, GRID[1] // 2, 1)))
        with pytest.raises(ValueError, match=r"audio .*new stream"):
            compiled.denoise(x, replace(block, audio=block.audio[..., :8]))
    with pytest.raises(RuntimeError, match="condition"):
        CapturedBlock(dit, torch.randn(5, 16), MODE, GRID).denoise(*blocks(1)[0])
    windowed = LiveAvatar(replace(CONFIG, local_attn_size=6))
    with pytest.raises(ValueError, match="single"):
        CapturedBlock(windowed, torch.randn(5, 16), MODE, GRID)


@pytest.mark.parametrize("values", [None, "fp8", "mixed"])
def test_a_new_stream_begins_in_the_same_buffers(values: str | None) -> None:
    """What an earlier stream left, NaN included, does not reach the next; nothing is compiled or allocated again."""
    dtype = torch.float32 if values is None else torch.bfloat16
    dit, ring = model(dtype), RingFormat(dtype, values)  # type: ignore[arg-type]
    first, second, inputs = torch.randn(5, 16), torch.randn(3, 16), blocks(3)
    with torch.inference_mode():
        wanted = run(CapturedBlock(dit, second, MODE, GRID, ring=ring), inputs, dit)
        used = CapturedBlock(dit, first, MODE, GRID, ring=ring)
        run(used, blocks(4), dit)
        x, block = blocks(1)[0]
        assert used.denoise(torch.full_like(x, torch.nan), block).isnan().all()
        program, places = used.program, {t.data_ptr() for t in used.text_inputs.tensors}
        used.begin(second)
        with pytest.raises(RuntimeError, match="condition"):
            used.denoise(*blocks(1)[0])
        found = run(used, inputs, dit)
    assert torch.equal(found, wanted)
    assert used.program is program and {t.data_ptr() for t in used.text_inputs.tensors} == places


@pytest.mark.parametrize("quantised", [False, True])
def test_joined_weights_are_held_once(quantised: bool) -> None:
    """Every weight has one storage after two streams were compiled, and the model's own names still work."""
    dit = model(torch.bfloat16)
    if quantised:
        quantize_linears(dit, granularity="row")
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    own = sum(t.nbytes for t in (*dit.parameters(), *dit.buffers()))
    with torch.inference_mode():
        programs = [CapturedBlock(dit, torch.randn(5, 16), MODE, GRID).compile() for _ in range(2)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*dit.parameters(), *dit.buffers())}
    assert sum(held.values()) == own
    for program in programs:
        assert {report.name: report.matches for report in program.reports}["concatenate"] == CONFIG.num_layers
        for name, value in program.module.named_buffers():
            if "+2" in name.replace("_", "+"):  # q with k and v
                assert value.untyped_storage().data_ptr() in held
    for name, value in dit.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name


def test_one_row_may_have_any_stride() -> None:
    held = torch.arange(17.0)
    parts = [held[:4].as_strided((1, 4), (17, 1)), held[4:12].view(2, 4)]
    view = joined_view(parts)
    assert view is not None and torch.equal(view, torch.cat(parts))
