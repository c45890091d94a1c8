"""Published key lists from our configs on the meta device, and the mapping tables (golden/wan `keys_*`, `keymap`)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, UMT5EncoderModel, Wav2Vec2Model

from ....checkpoints_tools.keymaps import (
    CLIP,
    UMT5,
    KeyMap,
    clip_unread_shapes,
    vae_diffusers_keymap,
    wav2vec2_keymap,
)
from ....checkpoints_tools.keymaps_dit import WAN_DIFFUSERS
from ....runtime.encoders.clip import CLIP_VIT_H_14
from ....runtime.encoders.umt5 import UMT5_XXL
from ....runtime.encoders.wav2vec import WAV2VEC2_BASE, WAV2VEC2_LARGE_XLSR
from ..case import Case
from ..registry import handles

CTC_LETTERS = 33  # of the English head that LiveAvatar's wav2vec 2.0 carries and nobody reads


def _shapes(module: nn.Module, keymap: KeyMap) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of a module on the meta device; a tensor tied under two names counts once."""
    return {key: tuple(value.shape) for key, value in keymap.invert(dict(module.named_parameters())).items()}


def _key_list(case: Case, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The three values of a `keys_*` case; the golden's order decides between equal sets alone."""
    order = {key: place for place, (key, _) in enumerate(case.json["keys"])}
    keys = sorted(shapes, key=lambda key: order.get(key, len(order)))
    return {
        "json.keys": [[key, list(shapes[key])] for key in keys],
        "json.n_keys": len(shapes),
        "json.n_params": sum(torch.Size(shape).numel() for shape in shapes.values()),
    }


def _umt5() -> nn.Module:
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5_XXL.to_transformers())
    model.encoder.embed_tokens = model.shared
    return model


def _clip() -> nn.Module:
    """The whole published tower under `vision_model`, whatever the version of transformers calls it."""
    with torch.device("meta"):
        model = CLIPVisionModel(CLIP_VIT_H_14.to_transformers())
    tower = nn.Module()
    tower.vision_model = getattr(model, "vision_model", model)
    return tower


@handles("wan", "keys_umt5_xxl_encoder")
def keys_umt5(case: Case) -> dict[str, Any]:
    return _key_list(case, _shapes(_umt5(), UMT5))


@handles("wan", "keys_clip_xlm_roberta_vit_h_14")
def keys_clip(case: Case) -> dict[str, Any]:
    return _key_list(case, _shapes(_clip(), CLIP) | clip_unread_shapes(CLIP_VIT_H_14.dim))


@handles("wan", "keys_wav2vec2_*")
def keys_wav2vec2(case: Case) -> dict[str, Any]:
    with_head = case.name.endswith("_ctc")
    size = WAV2VEC2_LARGE_XLSR if with_head else WAV2VEC2_BASE
    with torch.device("meta"):
        model = Wav2Vec2Model(size.to_transformers())
    shapes = _shapes(model, wav2vec2_keymap(["wav2vec2."] if with_head else []))
    if with_head:
        shapes |= {"lm_head.weight": (CTC_LETTERS, size.dim), "lm_head.bias": (CTC_LETTERS,)}
    return _key_list(case, shapes)


def _row(pattern: str, replacement: str, keys: Sequence[str], keymap: KeyMap) -> list[str]:
    """The golden's row when our table sends every key of it to the same place; else the first key that differs."""
    if not keys:
        return [pattern, "matches no published key"]
    for key in keys:
        if replacement == "(unused)":
            if not keymap.is_unused(key):
                return [pattern, f"{key} is read"]
            continue
        wanted = re.sub(pattern, replacement, key)
        group = re.search(r"\{(.*?)\}", wanted)  # `{q,k,v}` stands for one key each
        parts = group.group(1).split(",") if group else [""]
        if keymap.rename(key) != tuple(re.sub(r"\{.*?\}", part, wanted) for part in parts):
            return [pattern, f"{key} -> {keymap.rename(key)}"]
    return [pattern, replacement]


def _regex_table(case: Case, name: str, files: Sequence[str], keymap: KeyMap) -> list[list[str]]:
    """Our table on the published keys, told in the golden's rows (the first row that matches decides)."""
    owned: dict[str, list[str]] = {pattern: [] for pattern, _ in case.json[name]}
    for key in dict.fromkeys(key for file in files for key, _ in case.sibling(file).json["keys"]):
        first = next((pattern for pattern in owned if re.search(pattern, key)), None)
        if first:
            owned[first].append(key)
        elif not keymap.is_unused(key):
            owned[key] = [key]  # a row that the golden has not: the comparison fails and names the key
    rows = dict(case.json[name])
    return [_row(pattern, rows.get(pattern, ""), keys, keymap) for pattern, keys in owned.items()]


def _vae_row(prefix: str, keymap: KeyMap) -> list[str]:
    """A row of the prefix table: modules are asked for by their weight, parameters by themselves."""
    ending = "" if prefix.endswith(".gamma") else ".weight"
    return [prefix, "".join(keymap.rename(prefix + ending)).removesuffix(ending)]


def _difference(case: Case, file: str, module: nn.Module, keymap: KeyMap) -> list[list[str]]:
    """[missing, unexpected] when the published keys are renamed and loaded into the module of the library."""
    keys = [key for key, _ in case.sibling(file).json["keys"] if not keymap.is_unused(key)]
    mapped = {name for key in keys for name in keymap.rename(key) or (key,)}
    wanted = {name for name, _ in module.named_parameters()}
    return [sorted(wanted - mapped), sorted(mapped - wanted)]


@handles("wan", "keymap")
def keymap(case: Case) -> dict[str, Any]:
    umt5, clip = "keys_umt5_xxl_encoder", "keys_clip_xlm_roberta_vit_h_14"
    dit = ("keys_wan21_i2v_14B", "keys_wan21_t2v_1_3B")
    vae = vae_diffusers_keymap()
    return {
        "json.dit_to_diffusers": _regex_table(case, "dit_to_diffusers", dit, WAN_DIFFUSERS),
        "json.t5_to_transformers": _regex_table(case, "t5_to_transformers", [umt5], UMT5),
        "json.clip_to_transformers": _regex_table(case, "clip_to_transformers", [clip], CLIP),
        "json.vae_to_diffusers_prefix": [_vae_row(prefix, vae) for prefix, _ in case.json["vae_to_diffusers_prefix"]],
        "json.measured.t5_keys": _difference(case, umt5, _umt5(), UMT5),
        "json.measured.clip_keys": _difference(case, clip, _clip(), CLIP),
    }
