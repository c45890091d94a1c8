"""What a captured stream holds: counted by part, and nothing else is alive."""

import gc

import pytest
import torch
from kinora.bench.memory import account, main, published, working_bytes
from kinora.graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar
from kinora.graphs.models.liveavatar_memory import RingFormat
from kinora.graphs.quantize import quantize_linears
from kinora.graphs.rewrite.program import Argument, trace
from kinora.graphs.rewrite.wan_vae import StreamingDecoder
from kinora.runtime.placement.batched_steps import BatchedSteps
from kinora.runtime.placement.captured import CapturedBlock
from small_block import GRID, MODE, model
from small_vae import TINY, make_vae

WORK = "working memory of a graph"


def live_bytes() -> int:
    """Of all tensors; those of traced graphs have shapes only."""
    gc.collect()
    real = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in real}.values())


@pytest.mark.parametrize("kind", [CapturedBlock, BatchedSteps])
@pytest.mark.parametrize(("quantised", "values"), [(False, None), (True, "fp8"), (True, "joined")])
def test_the_account_is_all_that_is_alive(
    kind: type[CapturedBlock] | type[BatchedSteps], quantised: bool, values: str | None
) -> None:
    """Nothing is held twice: no second copy of joined or quantised weights, of the prompt or of the condition."""
    torch.manual_seed(0)
    before = live_bytes()
    dit = model(torch.bfloat16)
    if quantised:
        quantize_linears(dit, granularity="row")
    vae = make_vae(TINY)
    with torch.no_grad():
        ring = RingFormat(torch.bfloat16, values)  # type: ignore[arg-type]
        stream = kind(dit, torch.randn(5, 16), MODE, GRID, ring=ring)
        stream.compile()
        stream.condition(torch.randn(1, 16, 1, *GRID), torch.randn(1, 16, 5, *GRID))
        stream.begin(torch.randn(5, 16))
    decoder = StreamingDecoder(vae, *GRID)
    parts = {part.name: part.bytes for part in account(stream, ("vae", vae), ("decoder", decoder))}
    held = sum(size for name, size in parts.items() if name != WORK)
    assert held <= live_bytes() - before <= held + 4096  # the schedule's numbers
    weights = sum(t.nbytes for t in (*dit.parameters(), *dit.buffers()))
    assert parts["transformer weights"] == weights and parts["what the compiler added"] < 0.05 * weights


def test_fp8_layers_hold_no_bfloat16_originals() -> None:
    """A quantised weight takes one byte for two, and a float32 scale a row."""
    dit = model(torch.bfloat16)
    wide = sum(t.nbytes for t in dit.parameters())
    weights = [dit.get_submodule(name).weight for name in quantize_linears(dit, granularity="row")]
    assert all(isinstance(w, torch.Tensor) and w.dtype == torch.float8_e4m3fn for w in weights)
    narrow = sum(t.nbytes for t in (*dit.parameters(), *dit.buffers()))
    assert narrow == wide - sum(w.nbytes for w in weights) + sum(4 * len(w) for w in weights)


def test_the_published_model_by_its_sizes() -> None:
    """e4m3 rings of four steps in slots of 3,200 rows for 3,168 tokens; one condition for all steps."""
    parts = {part.name: part.bytes for part in published("fp8")}
    config = LIVEAVATAR_14B
    slot = 3200 * config.dim * 2 + config.dim * 4  # keys, values, their descales
    assert parts["rings"] == 4 * config.num_layers * 4 * slot
    assert parts["condition keys and values"] == config.num_layers * (2688 * config.dim * 2 + config.dim * 4)
    with torch.device("meta"):
        elements = sum(p.numel() for p in LiveAvatar(config).parameters())
    assert elements < parts["transformer weights"] < 1.1 * elements  # bytes: most are e4m3
    assert sum(parts.values()) < 50e9


def test_caches_in_one_buffer_by_their_sizes() -> None:
    """Each step holds the condition (2,640 rows) in its ring; a prompt's 512 rows take one byte for two."""
    parts = {part.name: part.bytes for part in published("fp8", ring=RingFormat(torch.bfloat16, "joined"))}
    config = LIVEAVATAR_14B
    assert parts["rings"] == 4 * config.num_layers * 2 * (4 * 3168 + 2640) * config.dim
    narrow = config.num_layers * 2 * config.text_len * config.dim
    assert narrow <= parts["text keys and values"] < 1.01 * narrow  # scales
    assert parts["condition keys and values"] == 0


def test_working_memory_is_what_is_alive_at_once() -> None:
    a = torch.randn(4, 8)

    def chain(x: torch.Tensor) -> torch.Tensor:
        y = x.exp().view(8, 4)  # a view of 128 bytes keeps them alive
        z = torch.cat((y, y, y))  # 384 more: the peak
        return z.sum().view(1)

    with torch.no_grad():
        program = trace(chain, {"x": Argument(a, "step")})
    assert working_bytes(program) == 128 + 384


def test_the_command_prints_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batched"]) == 0
    told = capsys.readouterr().out
    assert "rings" in told and told.splitlines()[-1].startswith("all")
