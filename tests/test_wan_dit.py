"""The Wan DiT: published sizes, padding, ragged batches, per-token time, training, errors, precision as data."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.checkpoints_tools.keymaps_dit import WAN_DIFFUSERS
from kinora.graphs.models import wan_configs
from kinora.graphs.models.wan import SelfAttention, WanModel, set_precision
from kinora.graphs.models.wan_configs import WanConfig

TINY = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=20, text_len=7)
TINY_I2V = WanConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=1, in_dim=36, freq_dim=32, text_dim=20, text_len=7, image_dim=12
)


def make(config: WanConfig) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(config)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)  # published init is zero and would hide everything
    return model


def latents(*grid: int, channels: int = 16) -> torch.Tensor:
    return torch.randn(channels, *grid, generator=torch.Generator().manual_seed(sum(grid)))


def text(rows: int, width: int = 20) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(
    ("name", "keys", "parameters"),
    [
        ("WAN21_T2V_1_3B", 825, 1_418_996_800),
        ("WAN21_T2V_14B", 1095, 14_288_491_584),
        ("WAN21_I2V_14B", 1303, 16_394_878_784),
        ("WAN22_I2V_A14B", 1095, 14_288_491_584 + 5120 * 20 * 4),
    ],
)
def test_published_sizes(name: str, keys: int, parameters: int) -> None:
    with torch.device("meta"):
        state = WanModel(getattr(wan_configs, name)).state_dict()
    assert len(state) == keys
    assert sum(value.numel() for value in state.values()) == parameters


def test_published_config_json() -> None:
    values = {"_class_name": "WanModel", "dim": 5120, "eps": 1e-6, "ffn_dim": 13824, "freq_dim": 256, "in_dim": 36}
    values |= {"model_type": "i2v", "num_heads": 40, "num_layers": 40, "out_dim": 16, "text_len": 512}
    assert WanConfig.from_published(values) == wan_configs.WAN22_I2V_A14B
    assert WanConfig.from_published(values, image_dim=1280) == wan_configs.WAN21_I2V_14B
    with pytest.raises(ValueError, match="qk_norm"):
        WanConfig.from_published(values | {"qk_norm": False})


@torch.no_grad()
def test_sequence_padding_and_batching_change_nothing() -> None:
    model = make(TINY)
    samples, t = [latents(2, 4, 6), latents(1, 4, 4), latents(1, 4, 4)], torch.tensor([900.0, 30.0, 400.0])
    contexts = [text(7), text(2), text(5)]
    together = model(samples, t, contexts, seq_len=17)
    for index, sample in enumerate(samples):
        alone = model([sample], t[index : index + 1], [contexts[index]])[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-5)
        assert alone.shape == sample.shape


@torch.no_grad()
def test_per_token_time_of_one_value_is_per_sample_time() -> None:
    model = make(TINY)
    x, t = [latents(2, 4, 4), latents(2, 4, 4).flip(1)], torch.tensor([700.0, 20.0])
    rows = model(x, t, [text(3), text(4)])
    tokens = model(x, t[:, None].expand(-1, 8), [text(3), text(4)])
    torch.testing.assert_close(rows, tokens, rtol=1e-5, atol=1e-5)
    mixed = t[:, None].repeat(1, 8)
    mixed[:, :4] = 0.0
    assert not torch.allclose(model(x, mixed, [text(3), text(4)])[0], tokens[0], atol=1e-3)


@torch.no_grad()
def test_padded_text_rows_take_part() -> None:
    """An explicit zero row equals padding; another text_len changes the result (no mask in cross-attention)."""
    model = make(TINY)
    x, t = [latents(1, 4, 4)], torch.tensor([500.0])
    short = model(x, t, [text(3)])[0]
    explicit = model(x, t, [torch.cat((text(3), torch.zeros(1, 20)))])[0]
    torch.testing.assert_close(short, explicit)
    shorter = make(TINY.__class__(**{**TINY.__dict__, "text_len": 3}))
    shorter.load_state_dict(model.state_dict())
    assert not torch.allclose(shorter(x, t, [text(3)])[0], short, atol=1e-4)


@torch.no_grad()
def test_image_features_and_channels_matter() -> None:
    model = make(TINY_I2V)
    x, y, t = latents(1, 4, 4), latents(1, 4, 4, channels=20), torch.tensor([500.0])
    features = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(3))
    base = model([x], t, [text(3)], y=[y], clip_features=features)[0]
    assert base.shape == x.shape
    assert not torch.allclose(base, model([x], t, [text(3)], y=[-y], clip_features=features)[0], atol=1e-4)
    assert not torch.allclose(base, model([x], t, [text(3)], y=[y], clip_features=-features)[0], atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, found = make(TINY), []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        model([latents(2, 4, 4)], torch.tensor([300.0]), [text(4)])[0].square().mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in found[0])


def test_initialisation() -> None:
    model = WanModel(WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=1, text_dim=128, text_len=7))
    assert not model.head.head.weight.any()
    assert model.text_embedding[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].modulation.std().item() == pytest.approx(256**-0.5, rel=0.1)
    bound = (6 / (256 + 512)) ** 0.5
    assert model.blocks[0].ffn[0].weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not model.blocks[0].self_attn.q.bias.any()
    patch_bound = (6 / (256 + 16 * 4)) ** 0.5
    assert model.patch_embedding.weight.abs().max().item() == pytest.approx(patch_bound, rel=0.02)


@torch.no_grad()
def test_precision_flows_choose_dtypes() -> None:
    arguments = ([latents(1, 4, 4)], torch.tensor([500.0]), [text(3)])
    wanted = {
        "FLOAT32": (torch.float32, torch.float32),
        "WAN21_BF16_MODULE": (torch.bfloat16, torch.bfloat16),
        "WAN21_BF16_AUTOCAST": (torch.float32, torch.bfloat16),
        "WAN22_BF16_AUTOCAST": (torch.float32, torch.float32),
        "WAN22_BF16_CONVERTED": (torch.bfloat16, torch.float32),
    }
    exact = make(TINY)(*arguments)[0]
    for name, (weights, output) in wanted.items():
        model = make(TINY)
        set_precision(model, getattr(wan_configs, name))
        y = model(*arguments)[0]
        assert model.blocks[0].self_attn.q.weight.dtype == weights
        assert y.dtype == output, name
        assert (y.float() - exact).norm() / exact.norm() < 2e-2, name


def test_a_precision_flow_can_be_replaced() -> None:
    model = make(TINY)
    set_precision(model, wan_configs.WAN22_BF16_AUTOCAST)
    set_precision(model, wan_configs.FLOAT32)
    arguments = ([latents(1, 4, 4)], torch.tensor([500.0]), [text(3)])
    assert torch.equal(model(*arguments)[0], make(TINY)(*arguments)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [latents(1, 3, 4)]}, "divisible by the patch"),
        ({"x": [latents(1, 4, 4, channels=15)]}, "16 channels"),
        ({"seq_len": 3}, "more than seq_len"),
        ({"t": torch.zeros(2)}, "one of each per sample"),
        ({"t": torch.zeros(1, 3)}, "3 columns for 4 tokens"),
        ({"context": [text(8)]}, "truncate"),
        ({"clip_features": torch.zeros(1, 9, 12)}, "takes no clip_features"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"x": [latents(1, 4, 4)], "t": torch.zeros(1), "context": [text(3)]}
    with pytest.raises(ValueError, match=message):
        make(TINY)(**(arguments | change))


def test_image_model_without_features_is_refused() -> None:
    with pytest.raises(ValueError, match="needs clip_features"):
        make(TINY_I2V)([latents(1, 4, 4)], torch.zeros(1), [text(3)], y=[latents(1, 4, 4, channels=20)])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([(1, 2, 2), (2, 2, 3), (1, 3, 1)]), min_size=1, max_size=6))
def test_token_spans_cover_the_batch(grids: list[tuple[int, int, int]]) -> None:
    spans = make(TINY).token_spans(grids, torch.device("cpu"))
    rows = [span for span in spans for _ in range(span.samples.stop - span.samples.start)]
    assert [index for span in spans for index in range(span.samples.start, span.samples.stop)] == list(
        range(len(grids))
    )
    for grid, span in zip(grids, rows, strict=True):
        assert span.tokens == len(span.rope) == grid[0] * grid[1] * grid[2]
    assert all(a.tokens != b.tokens for a, b in pairwise(spans))


@torch.no_grad()
def test_attention_depends_on_relative_position_only() -> None:
    """Shifting every position of the rotary table by one frame leaves the self-attention unchanged."""
    torch.manual_seed(1)
    attention, x = SelfAttention(48, 2, 1e-6), torch.randn(1, 12, 48)
    span = make(TINY).token_spans([(3, 2, 2)], x.device)[0]
    shifted = make(TINY).token_spans([(4, 2, 2)], x.device)[0].rope[4:]
    torch.testing.assert_close(attention(x, [span]), attention(x, [span._replace(rope=shifted)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, TINY_I2V])
def test_diffusers_key_map_is_a_bijection(config: WanConfig) -> None:
    with torch.device("meta"):
        state = WanModel(config).state_dict()
    mapped, unknown = WAN_DIFFUSERS.apply(state)
    assert not unknown
    assert len(mapped) == len(state)
    assert list(WAN_DIFFUSERS.invert(mapped)) == list(state)
    assert "blocks.0.attn1.to_out.0.weight" in mapped
