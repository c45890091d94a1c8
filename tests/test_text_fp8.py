"""A prompt in e4m3: its attention against the plain one, its scales, what a stream holds, and no drift."""

from pathlib import Path

import numpy as np
import pytest
import torch
from kinora.graphs.models.liveavatar_block import CrossAttention
from kinora.graphs.models.liveavatar_cache import KeyValue
from kinora.graphs.models.liveavatar_memory import RingFormat
from kinora.graphs.models.liveavatar_text import Fp8Context, Fp8TextState, embed_text_fp8
from kinora.kernels.kv_cache import E4M3
from kinora.runtime import load
from kinora.runtime.placement import static_stream
from kinora.runtime.placement.batched_steps import BatchedSteps
from kinora.runtime.placement.captured import CapturedBlock
from small_block import CONFIG, GRID, MODE, blocks, error, model, run
from torch import Tensor

DIM, HEADS, TOKENS = 96, 3, 40
EXAMPLES = Path(__file__).parent.parent / "examples"
RATE = 16_000


def layer() -> CrossAttention:
    attention = CrossAttention(DIM, HEADS, 1e-6).requires_grad_(False)
    attention.norm_q.weight.uniform_(0.5, 2.0)
    attention.norm_k.weight.uniform_(0.5, 2.0)
    return attention


def both(rows: int, scale: float = 1.0) -> tuple[CrossAttention, KeyValue, Fp8Context]:
    attention = layer()
    kept = attention.context(scale * torch.randn(1, TOKENS, DIM))
    return attention, kept, Fp8Context.of(attention, kept, rows)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_attention_is_near_the_plain_one(scale: float) -> None:
    """Whatever the values' size: their scale follows them, and the result's follows theirs."""
    attention, kept, narrow = both(14, scale)
    x = torch.randn(2, 7, DIM)
    found, wanted = attention(x, narrow), attention(x, kept)
    assert found.shape == wanted.shape and 0 < error(found, wanted) < 7e-2


def test_samples_share_a_prompt() -> None:
    attention, _, narrow = both(14)
    x = torch.randn(2, 7, DIM)
    apart = torch.cat([attention(one[None], narrow) for one in x])
    assert error(attention(x, narrow), apart) < 1e-3  # a sum in another order may round to a neighbour in e4m3


def test_scales_use_the_range_and_stay_inside_it() -> None:
    """The largest value becomes the largest number; sharp attention, whose result is that value, comes back whole."""
    _, kept, narrow = both(HEADS)
    assert narrow.v8.float().abs().max() == 448
    torch.testing.assert_close(narrow.v8.float() * narrow.scales[2], kept.v, rtol=2**-4, atol=1e-4)
    torch.testing.assert_close(narrow.k8.float() * narrow.scales[1], kept.k, rtol=2**-4, atol=1e-3)
    assert narrow.k8.float().abs().max() <= 448 and int(narrow.length) == TOKENS
    assert narrow.scales[6] * 448 == pytest.approx(float(kept.v.abs().max()), rel=1e-6)


def test_blank_values_stay_blank() -> None:
    attention = layer()
    narrow = Fp8Context.of(attention, KeyValue(*torch.zeros(2, 1, TOKENS, HEADS, DIM // HEADS)), 7)
    assert torch.equal(narrow.attend(torch.randn(1, 7, DIM), attention.norm_q.weight, 1e-6), torch.zeros(1, 7, DIM))


def test_several_prompts_and_too_many_queries_are_refused() -> None:
    attention, kept, narrow = both(13)
    with pytest.raises(ValueError, match="2 prompts"):
        Fp8Context.of(attention, KeyValue(*(t.expand(2, -1, -1, -1) for t in kept)), 13)
    with pytest.raises(ValueError, match="at least 14 rows"):
        attention(torch.randn(2, 7, DIM), narrow)


@pytest.mark.parametrize("kind", [CapturedBlock, BatchedSteps])
def test_a_joined_stream_holds_its_prompt_in_e4m3_only(kind: type[CapturedBlock] | type[BatchedSteps]) -> None:
    dit = model(torch.bfloat16)
    stream = kind(dit, torch.randn(5, 16), MODE, GRID, ring=RingFormat(torch.bfloat16, "joined"))
    assert isinstance(stream.text, Fp8TextState) and len(stream.text.layers) == CONFIG.num_layers
    for text in stream.text.layers:
        assert text.k8.dtype == text.v8.dtype == E4M3
        assert not any(t.dtype == torch.bfloat16 for t in vars(text).values() if isinstance(t, Tensor))


def test_another_prompt_in_the_same_buffers() -> None:
    """As a stream that was made for it, values of another size included."""
    dit, ring, inputs = model(torch.bfloat16), RingFormat(torch.bfloat16, "joined"), blocks(2)
    first, second = torch.randn(5, 16), 20 * torch.randn(3, 16)
    with torch.inference_mode():
        wanted = run(CapturedBlock(dit, second, MODE, GRID, ring=ring), inputs, dit)
        used = CapturedBlock(dit, first, MODE, GRID, ring=ring)
        before = run(used, inputs, dit)
        places = [t.data_ptr() for t in used.text_inputs.tensors]
        used.begin(second)
        found = run(used, inputs, dit)
    assert torch.equal(found, wanted) and not torch.equal(found, before)
    assert [t.data_ptr() for t in used.text_inputs.tensors] == places


def test_text_of_a_model_layer_by_layer() -> None:
    """The values of `embed_text`, rounded."""
    dit, prompt = model(torch.float32), torch.randn(5, 16)
    wide, narrow = dit.embed_text(prompt), embed_text_fp8(dit, prompt, 8)
    for kept, text in zip(wide.layers, narrow.layers, strict=True):
        assert error(text.k8.float() * text.scales[1], kept.k) < 4e-2
        assert error(text.v8.float() * text.scales[2], kept.v) < 4e-2


def test_a_talking_face_does_not_drift_from_that_of_other_fp8_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds, six blocks where the ring holds four: PSNR in dB of every block of 12 frames. Both are some
    39 dB from bfloat16, for 20 seconds too."""
    pytest.importorskip("av")
    from kinora.runtime.media import read_audio

    voice = read_audio(EXAMPLES / "voices" / "welcome.flac", RATE)[RATE // 2 : 7 * RATE // 2]
    made = {}
    for values in ("fp8", "joined"):
        monkeypatch.setattr(static_stream, "_ring_of", lambda dit, v=values: RingFormat(dit.dtype, v))
        avatar = load("tiny", device="cpu", precision="fp8", placement="captured")
        made[values] = avatar.generate(EXAMPLES / "faces" / "mira.png", voice, seed=5, size=(96, 96)).frames
    squared = (made["fp8"].astype(np.float64) - made["joined"]) ** 2
    psnr = [10 * np.log10(255**2 / squared[i : i + 12].mean()) for i in range(0, 72, 12)]
    assert min(psnr) > 35 and psnr[-1] > psnr[0] - 5 and max(psnr) < 60, psnr
