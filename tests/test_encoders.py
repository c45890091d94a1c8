"""Encoders of text, picture and sound: key tables, loading errors, rounding, windows, live features."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.checkpoints_tools.assign import KeyMismatch, assign_state
from kinora.checkpoints_tools.keymaps import CLIP, UMT5, KeyMap, Rule, rules, vae_diffusers_keymap, wav2vec2_keymap
from kinora.checkpoints_tools.read import UnreadableFile, read_state
from kinora.checkpoints_tools.sources import Weights
from kinora.runtime.encoders import audio_windows as windows
from kinora.runtime.encoders.clip import ClipSize, ClipVision, clip_pixels
from kinora.runtime.encoders.half_precision import rounded_once
from kinora.runtime.encoders.text import TextEncoder, TextTokenizer, clean_text
from kinora.runtime.encoders.umt5 import Umt5Encoder, Umt5Size, clamp_overflow, relative_buckets, trim, zero_padding
from kinora.runtime.encoders.wav2vec import Wav2Vec2Encoder, normalise_waveform
from kinora.runtime.errors import CheckpointError, InputError
from safetensors.torch import save_file
from small_speech import TINY_SPEECH
from torch import Tensor
from torch.nn import functional as F

TINY_TEXT = Umt5Size(vocab=40, dim=16, heads=2, head_dim=8, ffn=24, layers=2)
TINY_CLIP = ClipSize(dim=16, heads=2, layers=3, ffn=32, image_size=28, patch=14)


def published(module: torch.nn.Module, keymap: KeyMap) -> dict[str, Tensor]:
    """The weights of a module as the published file would hold them."""
    return {key: value.detach().clone() for key, value in keymap.invert(dict(module.named_parameters())).items()}


# -- key tables ---------------------------------------------------------------------------------------------------


def test_a_split_rule_and_its_inverse() -> None:
    keymap = KeyMap("toy", (Rule("qkv.{w}", ("q.{w}", "k.{w}", "v.{w}")), Rule("c", ("c",), leading=2)), ("head.",))
    state = {"qkv.bias": torch.arange(6.0), "c": torch.ones(1, 1, 3), "head.x": torch.ones(1), "what": torch.ones(1)}
    mapped, unknown = keymap.apply(state)
    assert {key: value.tolist() for key, value in mapped.items()} == {
        "q.bias": [0.0, 1.0],
        "k.bias": [2.0, 3.0],
        "v.bias": [4.0, 5.0],
        "c": [1.0, 1.0, 1.0],
    }
    assert unknown == ["what"]
    back = keymap.invert(mapped)
    assert list(back) == ["qkv.bias", "c"]
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    assert keymap.original("v.bias") == "qkv.bias"
    with pytest.raises(KeyError, match="elsewhere"):
        keymap.invert({"elsewhere": torch.ones(1)})


def test_a_placeholder_is_one_component() -> None:
    keymap = KeyMap("toy", rules(("a.{i}.w", "b.{i}.w")))
    assert keymap.rename("a.3.w") == ("b.3.w",)
    assert keymap.rename("a.3.4.w") == () and keymap.rename("xa.3.w") == ()


def test_the_vae_table_follows_the_number_of_blocks() -> None:
    assert vae_diffusers_keymap().rename("decoder.upsamples.7.time_conv.bias") == (
        "decoder.up_blocks.1.upsamplers.0.time_conv.bias",
    )
    small = vae_diffusers_keymap(levels=3, res_blocks=1)
    assert small.rename("decoder.upsamples.4.shortcut.weight") == (
        "decoder.up_blocks.1.resnets.1.conv_shortcut.weight",
    )
    assert small.original("decoder.up_blocks.1.upsamplers.0.resample.1.bias") == "decoder.upsamples.5.resample.1.bias"


@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
@pytest.mark.parametrize("old", [False, True])
def test_wav2vec2_reads_both_weight_norm_names_and_both_prefixes(prefix: str, old: bool) -> None:
    source = Wav2Vec2Encoder(TINY_SPEECH)
    state = published(source.model, wav2vec2_keymap([prefix], old_weight_norm=old))
    assert (f"{prefix}encoder.pos_conv_embed.conv.weight_g" in state) is old
    assert all(key.startswith(prefix) for key in state)
    state.pop(f"{prefix}masked_spec_embed")  # a published file lacks it
    state["lm_head.weight"] = torch.zeros(3, 16)
    target = Wav2Vec2Encoder(TINY_SPEECH)
    target.assign(state)
    wave = torch.randn(1, 4000)
    assert all(torch.equal(a, b) for a, b in zip(source(wave), target(wave), strict=True))


def test_mismatches_are_listed_by_their_published_names() -> None:
    encoder = Umt5Encoder(TINY_TEXT)
    state = published(encoder.model, UMT5)
    del state["blocks.1.attn.k.weight"]
    state["blocks.0.norm1.weight"] = torch.ones(5)
    state["blocks.1.norm1.weight"] = torch.ones(16, dtype=torch.int8)
    state["norm.weight"] = torch.ones(16).half()  # another precision is no misfit
    state["blocks.7.norm2.weight"] = torch.ones(16)
    state["decoder.x"] = torch.ones(1)
    with pytest.raises(KeyMismatch) as caught:
        assign_state(encoder.model, state, UMT5)
    assert caught.value.missing == ["blocks.1.attn.k.weight"]
    assert caught.value.unexpected == ["decoder.x", "blocks.7.norm2.weight"]
    assert sorted(caught.value.misshaped) == [
        "blocks.0.norm1.weight [5], expected [16]",
        "blocks.1.norm1.weight torch.int8 [16], expected torch.float32 [16]",
    ]
    assert "blocks.1.attn.k.weight" in str(caught.value)


@pytest.mark.parametrize("rows", [1, 2, 4, 16, 47])
def test_a_joined_projection_of_other_rows_is_misshaped(rows: int) -> None:
    encoder = ClipVision(TINY_CLIP, blocks=3)
    key = "visual.transformer.1.attn.to_qkv.weight"
    state = published(encoder, CLIP) | {key: torch.ones(rows, 16)}
    with pytest.raises(KeyMismatch) as caught:
        assign_state(encoder, state, CLIP)
    assert caught.value.misshaped and all(told.startswith(f"{key} [") for told in caught.value.misshaped)


# -- files --------------------------------------------------------------------------------------------------------


def test_reading_refuses_what_it_cannot_trust(tmp_path) -> None:
    with pytest.raises(UnreadableFile, match="not there"):
        read_state(tmp_path / "no.pth")
    (tmp_path / "a.xyz").write_bytes(b"")
    with pytest.raises(UnreadableFile, match="unknown ending"):
        read_state(tmp_path / "a.xyz")
    torch.save({"w": torch.ones(2), "hook": print}, tmp_path / "code.pth")
    with pytest.raises(UnreadableFile, match="never executed"):
        read_state(tmp_path / "code.pth")
    torch.save({"w": torch.ones(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:700])
    with pytest.raises(UnreadableFile, match=r"cut\.pth"):
        read_state(tmp_path / "cut.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UnreadableFile, match="damaged"):
        read_state(tmp_path / "cut.safetensors")
    torch.save({"w": 3}, tmp_path / "number.pth")
    with pytest.raises(UnreadableFile, match="plain state dict"):
        read_state(tmp_path / "number.pth")


def test_reading_shards_and_wrapped_dicts(tmp_path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert set(read_state(index)) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}))
    with pytest.raises(UnreadableFile, match=": c"):
        read_state(index)
    torch.save({"model_state": {"a": torch.ones(2)}}, tmp_path / "wrapped.pth")
    assert set(read_state(tmp_path / "wrapped.pth")) == {"a"}


# -- text ---------------------------------------------------------------------------------------------------------


def make_tokenizer(folder, words=("a", "cat", "sits")) -> None:
    """A tokenizer folder with the special tokens of UMT5: pad 0, </s> 1, <unk> 2, then the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_prompts_become_trimmed_rows_from_the_published_file(tmp_path) -> None:
    make_tokenizer(tmp_path)
    source = Umt5Encoder(TINY_TEXT)
    torch.save(published(source.model, UMT5), tmp_path / "t5.pth")
    encoder = TextEncoder.load(tmp_path / "t5.pth", tmp_path, TINY_TEXT, dtype=torch.float32)
    rows = encoder(["  a  cat\n sits ", ""])
    assert [list(row.shape) for row in rows] == [[4, 16], [1, 16]]  # the empty prompt is </s> alone
    alone = source(torch.tensor([[3, 4, 5, 1]]))[0]
    torch.testing.assert_close(rows[0], alone, rtol=1e-5, atol=1e-5)  # padding to 512 changes nothing


def test_long_prompts_are_cut_and_end_with_the_end_token(tmp_path) -> None:
    make_tokenizer(tmp_path)
    ids, mask = TextTokenizer(tmp_path, length=6)(["a cat sits " * 9, "cat"])
    assert ids.tolist() == [[3, 4, 5, 3, 4, 1], [4, 1, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [6, 2]


def test_text_errors(tmp_path) -> None:
    with pytest.raises(ValueError, match="whitespace"):
        clean_text("x", "tidy")
    with pytest.raises(CheckpointError, match="google/umt5-xxl"):
        TextTokenizer(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path)
    torch.save({"x": torch.ones(1)}, tmp_path / "t5.pth")
    with pytest.raises(CheckpointError, match=r"t5\.pth.*token_embedding\.weight"):
        Umt5Encoder.load(tmp_path / "t5.pth", TINY_TEXT)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_cleaning_leaves_single_spaces_and_settles(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned == cleaned.strip() and "  " not in cleaned and "\n" not in cleaned
    assert clean_text(text, "lower") == cleaned.lower()


@settings(deadline=None)
@given(st.integers(2, 16), st.integers(3, 200))
def test_buckets_are_monotonic_and_use_every_exact_distance(quarter: int, spread: int) -> None:
    buckets, far = 4 * quarter, quarter * 2 + spread
    back = relative_buckets(-torch.arange(2 * far), buckets, far)
    ahead = relative_buckets(torch.arange(1, 2 * far), buckets, far)
    assert bool((back.diff() >= 0).all()) and int(back.max()) == 2 * quarter - 1
    assert back[:quarter].tolist() == list(range(quarter))
    assert torch.equal(ahead - 2 * quarter, back[1:])


def test_float16_overflow_is_clamped_inside_the_encoder() -> None:
    torch.manual_seed(0)
    encoder = Umt5Encoder(TINY_TEXT).half()
    ids = torch.tensor([[3, 4, 5, 1]])
    feed_forward = encoder.model.encoder.block[0].layer[1].DenseReluDense
    for linear, scale in ((feed_forward.wi_0, 1.0), (feed_forward.wi_1, 1.0), (feed_forward.wo, 20_000.0)):
        linear.weight.copy_(torch.randn(linear.weight.shape).mul(scale).clamp(-60_000.0, 60_000.0))
    seen: list[Tensor] = []
    encoder.model.encoder.block[0].register_forward_hook(
        lambda module, inputs, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    hidden = encoder(ids)
    assert float(seen[0].abs().max()) == 64512.0 and bool(hidden.isfinite().all())


def test_clamping_touches_float16_with_infinities_alone() -> None:
    big = torch.tensor([65504.0, 1.0, -65504.0])
    assert clamp_overflow(big.half()).tolist() == big.tolist()
    assert clamp_overflow(torch.tensor([math.inf, -65504.0, 1.0]).half()).tolist() == [64512.0, -64512.0, 1.0]
    wide = torch.tensor([math.inf, 1e9]).bfloat16()
    assert clamp_overflow(wide) is wide


def test_trim_and_zero() -> None:
    hidden, mask = torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert [row.shape[0] for row in trim(hidden, mask)] == [2, 1]
    assert zero_padding(hidden, mask).sum((1, 2)).tolist() == [8.0, 4.0]


# -- picture ------------------------------------------------------------------------------------------------------


def test_clip_loads_the_file_and_reads_no_more_than_it_needs(tmp_path) -> None:
    whole = ClipVision(TINY_CLIP, blocks=3)
    whole.vision_model.post_layernorm = torch.nn.LayerNorm(16)
    state = published(whole, CLIP)
    assert state["visual.transformer.0.attn.to_qkv.weight"].shape == (48, 16)
    assert state["visual.pos_embedding"].shape == (1, 5, 16) and state["visual.cls_embedding"].shape == (1, 1, 16)
    state |= {"textual.x": torch.ones(1), "log_scale": torch.tensor(1.0), "visual.head": torch.ones(16, 4)}
    torch.save(state, tmp_path / "clip.pth")
    tower = ClipVision.load(tmp_path / "clip.pth", TINY_CLIP, dtype=torch.float32)
    assert len(tower.vision_model.encoder.layers) == 2
    seen: list[Tensor] = []
    whole.vision_model.encoder.layers[1].register_forward_hook(
        lambda module, inputs, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    videos = [torch.rand(3, 2, 20, 30) * 2 - 1, torch.rand(3, 1, 40, 10) * 2 - 1]
    whole(videos)
    rows = tower(videos)
    assert rows.shape == (3, 5, 16)
    torch.testing.assert_close(rows, seen[0])


def test_clip_pixels_of_a_plain_picture() -> None:
    pixels = clip_pixels([torch.full((3, 1, 8, 8), 0.5)], 4)
    wanted = (0.75 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(pixels, wanted.view(1, 3, 1, 1).expand(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\[3, f, H, W\]"):
        clip_pixels([torch.zeros(1, 3, 8, 8)])
    with pytest.raises(ValueError, match=r"1\.\.3"):
        ClipVision(TINY_CLIP, blocks=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_products_round_once_on_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((5, 64), (7, 64), (7,)))
    wave, kernel = torch.randn(2, 3, 20).to(dtype), torch.randn(4, 3, 5).to(dtype)
    with rounded_once():
        assert torch.equal(F.linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float()).to(dtype))
        assert torch.equal(x @ weight.T, (x.float() @ weight.float().T).to(dtype))
        total = F.conv1d(wave.float(), kernel.float(), None, 2).to(dtype)
        assert torch.equal(F.conv1d(wave, kernel, bias[:4], 2), total + bias[:4, None])
        assert F.linear(x.float(), weight.float()).dtype == torch.float32


# -- sound --------------------------------------------------------------------------------------------------------


def test_speech_encoder_loads_a_hub_folder(tmp_path) -> None:
    source = Wav2Vec2Encoder(TINY_SPEECH)
    state = published(source.model, wav2vec2_keymap([], old_weight_norm=True))
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Wav2Vec2Encoder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(source.model.config.to_dict()))
    encoder = Wav2Vec2Encoder.load(tmp_path)
    assert encoder.size == TINY_SPEECH
    wave = normalise_waveform(torch.randn(1, 8000))
    assert all(torch.equal(a, b) for a, b in zip(source(wave), encoder(wave), strict=True))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Wav2Vec2Encoder.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encoders_come_tensor_by_tensor(tmp_path, monkeypatch, dtype: torch.dtype) -> None:
    """The bits of a state dict assigned whole; what is cast is read into memory of its own, never mapped."""
    torch.manual_seed(0)
    speech, clip = Wav2Vec2Encoder(TINY_SPEECH), ClipVision(TINY_CLIP, blocks=TINY_CLIP.layers)
    states = {"speech": published(speech.model, wav2vec2_keymap([])), "clip": published(clip, CLIP)}
    for name, state in states.items():
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(speech.model.config.to_dict()))
    (tmp_path / "speech.safetensors").rename(tmp_path / "model.safetensors")
    mapped: list[str] = []
    plain = Weights.map
    monkeypatch.setattr(Weights, "map", lambda self, name: mapped.append(name) or plain(self, name))
    loaded_speech = Wav2Vec2Encoder.load(tmp_path, dtype=dtype)
    loaded_clip = ClipVision.load(tmp_path / "clip.safetensors", TINY_CLIP, dtype=dtype)
    assert bool(mapped) == (dtype == torch.float32)
    wanted_speech, wanted_clip = Wav2Vec2Encoder(TINY_SPEECH), ClipVision(TINY_CLIP)
    wanted_speech.assign(states["speech"], dtype=dtype)
    wanted_clip.assign(states["clip"], dtype=dtype)
    for loaded, wanted in ((loaded_speech, wanted_speech), (loaded_clip, wanted_clip)):
        ours, theirs = loaded.state_dict(), wanted.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(v.dtype == dtype and torch.equal(v, theirs[k]) for k, v in ours.items() if v.is_floating_point())
        assert not any(p.requires_grad for p in loaded.parameters()) and not any(m.training for m in loaded.children())
    picture = torch.rand(3, 1, 28, 28) * 2 - 1
    assert torch.equal(loaded_clip([picture]), wanted_clip([picture]))
    wave = torch.randn(1, 4000)
    assert all(torch.equal(a, b) for a, b in zip(loaded_speech(wave), wanted_speech(wave), strict=True))


def test_speech_states_are_those_of_transformers() -> None:
    encoder = Wav2Vec2Encoder(TINY_SPEECH)
    wave = torch.randn(1, 6000)
    wanted = encoder.model(wave, output_hidden_states=True)
    states = encoder(wave)
    assert len(states) == TINY_SPEECH.states == 3
    assert torch.equal(states[-1], wanted.last_hidden_state) and torch.equal(states[1], wanted.hidden_states[1])
    assert not torch.equal(states[-1], states[-2])


def test_sizes_of_the_convolution_stack() -> None:
    assert (TINY_SPEECH.stride, TINY_SPEECH.receptive_field) == (320, 400)
    assert [TINY_SPEECH.frames(n) for n in (0, 399, 400, 719, 720, 16000)] == [0, 0, 1, 1, 2, 49]
    with pytest.raises(InputError, match=r"at least 0\.025 s"):
        Wav2Vec2Encoder(TINY_SPEECH)(torch.zeros(1, 399))


def test_normalising_silence_gives_silence() -> None:
    assert float(normalise_waveform(torch.zeros(1, 100)).abs().max()) == 0.0


@settings(deadline=None)
@given(st.integers(1, 400), st.sampled_from([15, 16, 20, 24, 25, 30]), st.integers(1, 60), st.integers(0, 3))
def test_windows_cover_the_sound_and_are_zero_after_it(total: int, fps: int, batch: int, m: int) -> None:
    features = torch.arange(1.0, total + 1).view(1, total, 1).repeat(2, 1, 1)
    taken, clips = windows.bucket_by_fps(features, fps, batch, m)
    assert taken.shape == (clips * batch, 2, 2 * m + 1)
    centre = taken[:, 0, m]
    count = clips * batch
    times = np.linspace(0, count / fps, count, endpoint=False)
    inside = np.round(times * 30) < total
    assert count / fps * 30 > total - 1e-6 and (clips - 1) * batch / fps * 30 <= total + 1e-6
    assert bool((centre[torch.from_numpy(~inside)] == 0).all()) and bool((centre[torch.from_numpy(inside)] > 0).all())
    near = torch.from_numpy(np.abs(centre.numpy() - 1 - times * 30))
    assert float(near[torch.from_numpy(inside)].max()) <= 0.5


def test_window_errors_and_speakers() -> None:
    with pytest.raises(ValueError, match="A >= 1"):
        windows.bucket_by_fps(torch.zeros(2, 0, 3), 25, 12)
    with pytest.raises(ValueError, match="fps"):
        windows.bucket_by_fps(torch.zeros(2, 5, 3), 60, 12)
    with pytest.raises(ValueError, match="too short"):
        windows.resample_time(torch.zeros(2, 1, 3), 0)
    long, short = (windows.liveavatar_windows(torch.rand(3, frames, 4)) for frames in (90, 20))
    assert (long.clips, short.clips) == (2, 1) and long.features.shape == (1, 3, 4, 96)
    both = windows.join_speakers([long, short])
    assert both.clips == 1 and both.features.shape == (2, 3, 4, 48)
    assert torch.equal(both.features[:1], long.features[..., :48])
    one_state = windows.liveavatar_windows(torch.rand(1, 30, 4))
    assert one_state.features.shape == (1, 1, 4, 48)
    same_rate = torch.rand(2, 10, 4)  # features that already have the video's rate are taken one by one
    taken = windows.liveavatar_windows(same_rate, fps=20, batch_frames=12, rate=20).features
    assert torch.equal(taken[0, ..., :10], same_rate.permute(0, 2, 1)) and not taken[..., 10:].any()
