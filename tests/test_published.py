"""The tables of published checkpoints against the specifications' own lists; which file is which; round trips."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from kinora.checkpoints_tools.keymaps import (
    CLIP,
    UMT5,
    KeyMap,
    Rule,
    SameNames,
    rules,
    vae_diffusers_keymap,
    wav2vec2_keymap,
)
from kinora.checkpoints_tools.keymaps_dit import WAN_DIFFUSERS
from kinora.checkpoints_tools.keymaps_latentsync import WHISPER as WHISPER_TABLE
from kinora.checkpoints_tools.keymaps_latentsync import sd_vae_keymap
from kinora.checkpoints_tools.published.catalogue import CATALOGUE, SYSTEMS
from kinora.checkpoints_tools.published.identify import Adapters, Match, identify
from kinora.checkpoints_tools.published.rows import expand, names, tensor
from kinora.checkpoints_tools.sources import open_weights
from published_keys import (
    LIVEAVATAR,
    LIVEAVATAR_LORA,
    OMNIAVATAR,
    SKYREELS_REFERENCE,
    STABLEAVATAR,
    Shapes,
    listed,
    omniavatar_small,
    skyreels_avatar,
    transcribed,
)
from safetensors.torch import save_file
from torch import Tensor

BY_NAME = {published.name: published for published in CATALOGUE}
CTC = listed("wav2vec2_large_xlsr_53_english_ctc")

# name in the catalogue: the specification's list, its number of tensors, its number of parameters
SPECIFIED: dict[str, tuple[Shapes, int, int]] = {
    "Wan2.2-S2V-14B": (transcribed(LIVEAVATAR), 1260, 16_295_755_609),
    "LiveAvatar LoRA": (transcribed(LIVEAVATAR_LORA), 896, 676_331_520),
    "Wan2.1-T2V-1.3B": (listed("wan21_t2v_1_3B"), 825, 1_418_996_800),
    "Wan2.1-T2V-14B": (listed("wan21_t2v_14B"), 1095, 14_288_491_584),
    "Wan2.1-I2V-14B": (listed("wan21_i2v_14B"), 1303, 16_394_878_784),
    "Wan2.1-T2V-14B in diffusers": (transcribed(SKYREELS_REFERENCE), 1095, 14_288_491_584),
    "OmniAvatar-14B": (transcribed(OMNIAVATAR), 844, 618_684_512),
    "OmniAvatar-1.3B": (omniavatar_small(), 634, 177_271_392),
    "StableAvatar-1.3B": (transcribed(STABLEAVATAR), 1143, 1_747_426_112),
    "SkyReels-V3-A2V-19B": (skyreels_avatar(), 1633, 18_882_046_784),
    "Wan2.1 VAE": (listed("wan21_vae"), 194, 126_892_531),
    "UMT5-XXL encoder": (listed("umt5_xxl_encoder"), 242, 5_680_910_336),
    "CLIP XLM-R ViT-H/14": (listed("clip_xlm_roberta_vit_h_14"), 784, 1_193_014_785),
}
# latentsync.md 1: the lists that the original code printed (its goldens `manifest_*`), as digests
PRINTED = {
    "LatentSync U-Net": (1246, "1ea2a2efabbe25f129f72138ae2eabaefa095d42483c68fbbd502b1ade10628c"),
    "LatentSync U-Net, first stage": (686, "267c5105123a54fb242ffdfdb8aefa60f8dd6484bc02cb22916449c62b84067c"),
    "StableSyncNet": (266, "bc841f2c8aba4a7fc6b72e06ee1f5ab5dac46edcd477c1a0fbbf5d11a90c3eb6"),
}
# latentsync.md 2.3
WHISPER = """
encoder.conv1 | 384,80,3 | 384
encoder.conv2 | 384,384,3 | 384
encoder.positional_embedding | 1500,384
encoder.ln_post | 384 | 384
encoder.blocks.{0..3}.{attn_ln,mlp_ln} | 384 | 384
encoder.blocks.{0..3}.attn.{query,value,out} | 384,384 | 384
encoder.blocks.{0..3}.attn.key.weight | 384,384
encoder.blocks.{0..3}.mlp.0 | 1536,384 | 1536
encoder.blocks.{0..3}.mlp.2 | 384,1536 | 384
"""


def old_sd_vae() -> Shapes:
    """The SD VAE with the names that its middle attention had in 2022 (latentsync.md 2.2)."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    shapes = {}
    for key, shape in BY_NAME["sd-vae-ft-mse"].shapes.items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        shapes[key] = shape
    return shapes


# -- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIFIED)
def test_a_table_has_the_specified_tensors(name: str) -> None:
    wanted, tensors, parameters = SPECIFIED[name]
    assert BY_NAME[name].shapes == wanted
    assert len(wanted) == tensors and BY_NAME[name].parameters == parameters


@pytest.mark.parametrize("name", PRINTED)
def test_a_table_has_the_printed_tensors(name: str) -> None:
    tensors, digest = PRINTED[name]
    shapes = BY_NAME[name].shapes
    text = "".join(f"{key} {list(shapes[key])}\n" for key in sorted(shapes))
    assert len(shapes) == tensors and hashlib.sha256(text.encode()).hexdigest() == digest


def test_speech_tables_are_those_of_the_published_encoders() -> None:
    base = BY_NAME["wav2vec2-base"]
    assert {base.canonical(k): v for k, v in listed("wav2vec2_base_960h_encoder").items()} == base.shapes
    large = BY_NAME["wav2vec2-large-xlsr-53"]
    found = {large.canonical(key): shape for key, shape in CTC.items()}
    assert found.pop(None) == CTC["lm_head.bias"]  # the head is not read
    assert found == large.shapes
    assert BY_NAME["Whisper tiny"].shapes == transcribed(WHISPER)


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def test_tables_are_those_of_the_libraries_classes() -> None:
    from diffusers import AutoencoderKL, AutoencoderKLWan, WanTransformer3DModel
    from kinora.graphs.models.syncnet import SyncNet
    from transformers import UMT5EncoderModel, WhisperConfig, WhisperModel

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    large = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    image = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
    with torch.device("meta"):
        modules = {
            "sd-vae-ft-mse": AutoencoderKL(**blocks),
            "Wan2.1 VAE in diffusers": AutoencoderKLWan(),
            "SyncNet v2": SyncNet(),
            "Wan2.1-T2V-1.3B in diffusers": WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
            "Wan2.1-T2V-14B in diffusers": WanTransformer3DModel(**large),
            "Wan2.1-I2V-14B in diffusers": WanTransformer3DModel(**large, **image),
            "Wan2.2-I2V-A14B in diffusers": WanTransformer3DModel(**large, in_channels=36),
        }
        tiny = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
        whisper = WhisperModel(tiny).encoder
    for name, module in modules.items():
        assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == BY_NAME[name].shapes, name
    renamed, unknown = WHISPER_TABLE.apply({k: torch.empty(v, device="meta") for k, v in transcribed(WHISPER).items()})
    assert not unknown and shapes_of(renamed) == shapes_of(whisper.state_dict())
    old = {k: torch.empty(v, device="meta") for k, v in old_sd_vae().items()}
    assert shapes_of(sd_vae_keymap(old=True).apply(old)[0]) == BY_NAME["sd-vae-ft-mse"].shapes
    from kinora.runtime.encoders.umt5 import UMT5_XXL

    with torch.device("meta"):
        text = UMT5EncoderModel(UMT5_XXL.to_transformers())
    published = BY_NAME["UMT5-XXL encoder in transformers"]
    assert {published.canonical(k): tuple(v.shape) for k, v in text.state_dict().items()} == published.shapes


def test_our_graphs_have_the_published_tensors() -> None:
    from kinora.graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar
    from kinora.graphs.models.wan import WanModel
    from kinora.graphs.models.wan_configs import WAN21_I2V_14B, WAN21_T2V_1_3B, WAN21_T2V_14B, WAN22_I2V_A14B

    with torch.device("meta"):
        models = {
            "Wan2.2-S2V-14B": LiveAvatar(LIVEAVATAR_14B),
            "Wan2.1-T2V-1.3B": WanModel(WAN21_T2V_1_3B),
            "Wan2.1-T2V-14B": WanModel(WAN21_T2V_14B),
            "Wan2.1-I2V-14B": WanModel(WAN21_I2V_14B),
            "Wan2.2-I2V-A14B": WanModel(WAN22_I2V_A14B),
        }
    for name, model in models.items():
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == BY_NAME[name].shapes, name


def test_patterns() -> None:
    assert names("a<x,y>.<0-2>.b") == [f"a{w}.{i}.b" for w in "xy" for i in range(3)]
    with pytest.raises(ValueError, match=r"a\.1 twice"):
        expand({"a.<0-2>": tensor(1), "a.1": tensor(1)})


def test_systems_name_parts_of_the_catalogue() -> None:
    assert all(part in BY_NAME for parts in SYSTEMS.values() for part in parts)
    assert len(BY_NAME) == len(CATALOGUE)


# -- which file is which ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [published.name for published in CATALOGUE])
def test_every_checkpoint_is_told_from_the_others(name: str) -> None:
    found = identify(BY_NAME[name].shapes)
    assert isinstance(found, Match) and found.published.name == name and found.complete


@pytest.mark.parametrize("name", SPECIFIED)
def test_what_is_wrong_is_listed_by_name(name: str) -> None:
    shapes = dict(SPECIFIED[name][0])
    first, *_, last = shapes
    lost = shapes.pop(last)
    shapes[first] = (*shapes[first], 7)
    shapes["surplus.weight"] = lost
    found = identify(shapes)
    assert isinstance(found, Match) and found.published.name == name and not found.complete
    assert found.missing == (last,) and found.unexpected == ("surplus.weight",)
    assert found.misshaped == (f"{first} {list(shapes[first])}, expected {list(shapes[first][:-1])}",)


def test_other_names_of_the_same_tensors() -> None:
    vae = {f"model.{key}": shape for key, shape in listed("wan21_vae").items()}
    lora = {f"base_model.model.{key.replace('.default', '')}": v for key, v in transcribed(LIVEAVATAR_LORA).items()}
    sd = old_sd_vae()
    assert "encoder.mid_block.attentions.0.query.weight" in sd
    for name, shapes in {
        "Wan2.1 VAE": vae,
        "LiveAvatar LoRA": lora,
        "sd-vae-ft-mse": sd,
        "wav2vec2-large-xlsr-53": CTC,
    }.items():
        found = identify(shapes)
        assert isinstance(found, Match) and found.published.name == name and found.complete, name


def test_a_tensor_under_two_names_is_told() -> None:
    shapes = listed("wav2vec2_base_960h_encoder")
    twice = shapes | {"encoder.pos_conv_embed.conv.weight_g": (1, 1, 128)}
    found = identify(twice)
    assert isinstance(found, Match) and found.unexpected == ("encoder.pos_conv_embed.conv.weight_g",)


def test_other_loras_are_told_by_what_they_fit() -> None:
    kohya = {}
    for block in range(30):
        for part, (rows, columns) in {"self_attn_q": (1536, 1536), "ffn_0": (8960, 1536)}.items():
            kohya[f"lora_unet_blocks_{block}_{part}.lora_down.weight"] = (16, columns)
            kohya[f"lora_unet_blocks_{block}_{part}.lora_up.weight"] = (rows, 16)
            kohya[f"lora_unet_blocks_{block}_{part}.alpha"] = ()
    found = identify(kohya)
    assert isinstance(found, Adapters) and (found.layers, found.rank) == (60, 16)
    assert "Wan2.1-T2V-1.3B" in found.fits and "StableAvatar-1.3B" in found.fits
    assert "Wan2.1-T2V-14B" not in found.fits and "SkyReels-V3-A2V-19B" not in found.fits
    assert identify({"hello.weight": (3, 4)}) is None
    assert identify({}) is None and identify({"blocks.0.q.lora_A.weight": (), "blocks.0.q.lora_B.weight": ()}) is None
    assert identify({"blocks.0.q.lora_B.weight": (8, 4)}) == Adapters(1, 0, ())


# -- round trips ------------------------------------------------------------------------------------------------------


def small(shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint of these keys whose sides are at most 6, every tensor different; thirds stay thirds."""

    def side(size: int) -> int:
        return size if size <= 3 else 6 if size % 3 == 0 else 4

    counter, state = 0, {}
    for name, shape in shapes.items():
        sides = tuple(side(size) for size in shape)
        count = math.prod(sides)
        state[name] = ((torch.arange(count) + counter) % 251 - 125).to(dtype).reshape(sides)
        counter += count
    return state


def write(state: dict[str, Tensor], form: str, folder: Path) -> Path:
    """The checkpoint as a published file: one file, shards with an index, or a pickle, bare or wrapped."""
    if form == "single":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    if form == "shards":
        keys, index = list(state), {}
        for part in range(3):
            file = f"model-{part + 1:05d}-of-00003.safetensors"
            save_file({key: state[key] for key in keys[part::3]}, folder / file)
            index |= dict.fromkeys(keys[part::3], file)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": index}))
        return path
    torch.save({form: state, "global_step": 7} if form else state, folder / "model.pt")
    return folder / "model.pt"


LAYOUTS: dict[str, tuple[Shapes, KeyMap, str, torch.dtype]] = {
    "Wan2.2-S2V-14B": (transcribed(LIVEAVATAR), SameNames("S2V"), "shards", torch.bfloat16),
    "LiveAvatar LoRA": (transcribed(LIVEAVATAR_LORA), SameNames("LoRA"), "single", torch.bfloat16),
    "T2V 1.3B -> diffusers": (listed("wan21_t2v_1_3B"), WAN_DIFFUSERS, "single", torch.float32),
    "T2V 14B -> diffusers": (listed("wan21_t2v_14B"), WAN_DIFFUSERS, "shards", torch.float32),
    "I2V 14B -> diffusers": (listed("wan21_i2v_14B"), WAN_DIFFUSERS, "shards", torch.float32),
    "R2V -> Wan": (transcribed(SKYREELS_REFERENCE), WAN_DIFFUSERS.inverse(), "shards", torch.bfloat16),
    "OmniAvatar 14B": (transcribed(OMNIAVATAR), SameNames("OmniAvatar"), "", torch.bfloat16),
    "OmniAvatar 1.3B": (omniavatar_small(), SameNames("OmniAvatar"), "", torch.bfloat16),
    "StableAvatar": (transcribed(STABLEAVATAR), SameNames("StableAvatar"), "state_dict", torch.bfloat16),
    "SkyReels A2V": (skyreels_avatar(), SameNames("SkyReels"), "shards", torch.bfloat16),
    "U-Net": (BY_NAME["LatentSync U-Net"].shapes, SameNames("U-Net"), "state_dict", torch.float32),
    "StableSyncNet": (BY_NAME["StableSyncNet"].shapes, SameNames("SyncNet"), "state_dict", torch.float32),
    "Whisper -> transformers": (transcribed(WHISPER), WHISPER_TABLE, "model_state_dict", torch.float16),
    "SD VAE": (BY_NAME["sd-vae-ft-mse"].shapes, sd_vae_keymap(old=False), "single", torch.float32),
    "old SD VAE": (old_sd_vae(), sd_vae_keymap(old=True), "single", torch.float32),
    "SyncNet v2": (BY_NAME["SyncNet v2"].shapes, SameNames("SyncNet"), "", torch.float32),
    "Wan VAE -> diffusers": (listed("wan21_vae"), vae_diffusers_keymap(), "", torch.float32),
    "wrapped Wan VAE": (listed("wan21_vae"), vae_diffusers_keymap(), "model_state", torch.float32),
    "UMT5": (listed("umt5_xxl_encoder"), UMT5, "", torch.bfloat16),
    "CLIP": (listed("clip_xlm_roberta_vit_h_14"), CLIP, "", torch.float32),
    "wav2vec2 base": (listed("wav2vec2_base_960h_encoder"), wav2vec2_keymap([]), "single", torch.float32),
    "wav2vec2 CTC": (CTC, wav2vec2_keymap(CTC), "", torch.float32),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_goes_there_and_back(name: str, tmp_path: Path) -> None:
    shapes, keymap, form, dtype = LAYOUTS[name]
    state = small(shapes, dtype)
    with open_weights(write(state, form, tmp_path)) as weights:
        assert weights.keys() == state.keys()
        stored = {key: weights.read(key) for key in weights.in_file_order()}
        mapped, unknown = keymap.apply({key: weights.map(key) for key in weights})
    assert not unknown
    read = {key: value for key, value in state.items() if not keymap.is_unused(key)}
    back = keymap.invert(mapped)
    assert back.keys() == read.keys()
    for key, value in state.items():
        assert stored[key].dtype == dtype and torch.equal(stored[key], value), key
        assert key not in read or torch.equal(back[key], value), key
    assert sum(value.numel() for value in mapped.values()) == sum(value.numel() for value in read.values())


def test_a_table_read_backwards() -> None:
    forth = KeyMap("toy", rules(("a.{i}.w", "b.{i}.v"), ("c", "d")))
    back = forth.inverse()
    state = {"a.0.w": torch.ones(1), "c": torch.zeros(2)}
    found, unknown = back.apply(forth.apply(state)[0])
    assert not unknown and {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in state.items()}
    assert back.name == "toy, backwards"
    split = KeyMap("toy", (Rule("qkv", ("q", "k")),))
    with pytest.raises(ValueError, match="qkv"):
        split.inverse()
