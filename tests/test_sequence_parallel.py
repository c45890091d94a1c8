"""Sequence parallelism on gloo processes: equal to one device, with and without masked padding; the merge itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.models.wan import WanModel
from kinora.graphs.models.wan_configs import WanConfig
from kinora.runtime.placement import sequence_parallel as sp
from kinora.runtime.placement.local import run_ranks

SMALL = WanConfig(dim=64, ffn_dim=64, num_heads=4, num_layers=2, freq_dim=32, text_dim=20, text_len=7)


def small_model() -> WanModel:
    torch.manual_seed(0)
    model = WanModel(SMALL)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def inputs() -> dict:
    torch.manual_seed(1)
    x = [torch.randn(16, 1, 6, 10), torch.randn(16, 2, 4, 4)]  # 15 and 8 tokens: padding on several ranks
    return {"x": x, "t": torch.rand(2, 15) * 1000, "context": [torch.randn(3, 20), torch.randn(7, 20)]}


def four_ranks() -> dict[str, list[torch.Tensor]]:
    """One process: the three ways to split four ranks, with and without masked padding."""
    model, found = small_model(), {}
    for ulysses, ring in ((4, 1), (2, 2), (1, 4)):
        mesh = sp.SequenceMesh.create(ulysses, ring)
        found[f"{ulysses}x{ring}"] = sp.forward(model, mesh, **inputs())
        found[f"{ulysses}x{ring} unmasked"] = sp.forward(model, mesh, **inputs(), mask_padding=False)
    replica = sp.SequenceMesh.create(2, 1)  # two replicas of two ranks
    found["2x1"] = sp.forward(model, replica, **inputs())
    with pytest.raises(ValueError, match="4 ranks do not split into replicas of 3 x 1"):
        sp.SequenceMesh.create(3, 1)
    with pytest.raises(ValueError, match="3 heads do not split over 2 ranks"):
        sp.tokens_to_heads(torch.zeros(1, 2, 3, 8), replica.ulysses)
    return found


def test_every_split_equals_one_device() -> None:
    with torch.no_grad():
        wanted = small_model()(**inputs())
    results = run_ranks(four_ranks, 4)
    for found in results:
        for split in ("4x1", "2x2", "1x4", "2x1"):
            torch.testing.assert_close(found[split], wanted, rtol=1e-5, atol=1e-5)
        reference = found["4x1 unmasked"]
        assert not torch.allclose(reference[0], wanted[0], atol=1e-4)
        for split in ("2x2", "1x4"):
            torch.testing.assert_close(found[f"{split} unmasked"], reference, rtol=1e-5, atol=1e-5)
    for found in results[1:]:
        assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], results[0][name], strict=True))


def one_rank_fails() -> None:
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("rank one gave up")
    torch.distributed.barrier()


def test_the_error_of_the_rank_that_broke_reaches_the_caller() -> None:
    with pytest.raises(RuntimeError, match="rank one gave up"):
        run_ranks(one_rank_fails, 2, timeout_s=60)


@pytest.mark.parametrize(
    ("ranks", "heads", "degrees"), [(4, 12, (4, 1)), (8, 12, (4, 2)), (2, 3, (1, 2)), (5, 40, (5, 1))]
)
def test_degrees_use_the_heads_first(ranks: int, heads: int, degrees: tuple[int, int]) -> None:
    assert sp.choose_degrees(ranks, heads) == degrees


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(0.1, 30.0))
def test_merged_blocks_equal_attention_over_all_keys(queries: int, blocks: list[int], spread: float) -> None:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(2, queries, 3, 8, generator=generator) * spread
    k, v = (torch.randn(2, sum(blocks), 3, 8, generator=generator) for _ in range(2))
    whole, whole_lse = sp.attention_with_lse(q, k, v)
    out, lse = torch.zeros_like(whole), torch.full(whole.shape[:3], -torch.inf)
    for keys, values in zip(k.split(blocks, 1), v.split(blocks, 1), strict=True):
        out, lse = sp.merge_partial(out, lse, *sp.attention_with_lse(q, keys, values))
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(whole, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
