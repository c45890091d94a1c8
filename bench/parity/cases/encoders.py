"""Text, picture and sound encoders, audio windows, key tables (golden/wan and golden/liveavatar)."""

from typing import Any

import torch
from torch import Tensor, nn

from ....checkpoints_tools.assign import assign_state
from ....checkpoints_tools.keymaps import UMT5
from ....runtime.encoders import audio_windows as windows
from ....runtime.encoders.clip import ClipSize, ClipVision, clip_pixels
from ....runtime.encoders.text import CLEANERS, clean_text
from ....runtime.encoders.umt5 import Umt5Encoder, Umt5Size, clamp_overflow, relative_buckets, trim, zero_padding
from ....runtime.encoders.wav2vec import Wav2Vec2Encoder, Wav2Vec2Size, normalise_waveform
from ..case import Case
from ..registry import handles


def _record(modules: dict[str, nn.Module], found: dict[str, Tensor]) -> None:
    """Keep the output of each module under its name at the next run."""

    def keep(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in modules.items():
        module.register_forward_hook(keep(name))


@handles("wan", "text_clean")
def text_clean(case: Case) -> dict[str, Any]:
    return {
        f"json.cases.{i}.{mode}": clean_text(entry["text"], mode)
        for i, entry in enumerate(case.json["cases"])
        for mode in CLEANERS
        if mode in entry
    }


@handles("wan", "t5_buckets")
def t5_buckets(case: Case) -> dict[str, Tensor]:
    return {
        name: relative_buckets(case[given["rel_pos"]], given["num_buckets"], case.json["max_dist"])
        for name, given in case.json["outputs"].items()
    }


def _umt5(case: Case, dtype: torch.dtype = torch.float32, **scaled: float) -> Umt5Encoder:
    config = case.json
    size = Umt5Size(
        vocab=config["vocab"],
        dim=config["dim"],
        heads=config["num_heads"],
        head_dim=config["dim_attn"] // config["num_heads"],
        ffn=config["dim_ffn"],
        layers=config["num_layers"],
        buckets=config["num_buckets"],
        max_distance=config["max_dist"],
        eps=config["eps"],
    )
    encoder = Umt5Encoder(size)
    weights = case.weights()
    for key, factor in scaled.items():
        weights[key] = weights[key] * factor
    assign_state(encoder.model, weights, UMT5, dtype=dtype)
    return encoder


@handles("wan", "t5_encoder")
def t5_encoder(case: Case) -> dict[str, Tensor]:
    encoder = _umt5(case)
    ids, mask = case["in.ids"], case["in.mask"]
    block = encoder.model.encoder.block[0]
    attention, feed_forward = block.layer
    found: dict[str, Tensor] = {"out.hidden_nomask": encoder(ids)}
    parts = {"mid.embed": encoder.model.shared, "mid.norm1": attention.layer_norm}
    parts |= {"mid.attn": attention.SelfAttention, "mid.block0": block}
    _record(parts, found)
    hidden = encoder(ids, mask)
    positions = torch.arange(ids.shape[1])
    buckets = relative_buckets(positions - positions[:, None], encoder.size.buckets, encoder.size.max_distance)
    table = attention.SelfAttention.relative_attention_bias.weight
    found["mid.pos_bias"] = table[buckets].permute(2, 0, 1)[None]
    found["mid.ffn"] = feed_forward.DenseReluDense(case["mid.embed"])
    found["out.hidden"] = hidden
    found["out.zeroed"] = zero_padding(hidden, mask)
    found |= {f"out.trimmed.{i}": rows for i, rows in enumerate(trim(hidden, mask))}
    found["out.hidden_bf16"] = _umt5(case, torch.bfloat16)(ids, mask)
    return found


@handles("wan", "t5_fp16_clamp")
def t5_fp16_clamp(case: Case) -> dict[str, Tensor]:
    dtype = getattr(torch, case.json["weights_dtype"])
    encoder = _umt5(case, dtype, **{case.json["scaled_weight"]: case.json["scale"]})
    source = case if "in.ids" in case else case.sibling(case.json["weights"])
    found: dict[str, Tensor] = {}
    _record({f"out.blocks.{i}": block for i, block in enumerate(encoder.model.encoder.block)}, found)
    found["out.hidden"] = encoder(source["in.ids"], source["in.mask"])
    found["out.finite"] = clamp_overflow(case["in.finite"])
    found["out.with_inf"] = clamp_overflow(case["in.with_inf"])
    found["out.finite_f32"] = clamp_overflow(4 * case["in.finite"].float())
    return {name: value for name, value in found.items() if name in case}


def _videos(case: Case) -> list[Tensor]:
    names = sorted(case.names("in.videos."), key=lambda name: int(name.rsplit(".", 1)[1]))
    return [case[name] for name in names]


def _clip(case: Case, blocks: int, dtype: torch.dtype | None = None) -> ClipVision:
    config = case.json
    size = ClipSize(
        dim=config["vision_dim"],
        heads=config["vision_heads"],
        layers=config["vision_layers"],
        ffn=int(config["vision_dim"] * config["mlp_ratio"]),
        image_size=config["image_size"],
        patch=config["patch_size"],
        eps=config["eps"],
    )
    tower = ClipVision(size, blocks)
    tower.assign(case.weights(), dtype=dtype)
    return tower


@handles("wan", "clip_visual", "clip_visual_fp16")
def clip_visual(case: Case) -> dict[str, Tensor]:
    dtype = getattr(torch, case.json.get("weights_dtype", "float32"))
    videos = _videos(case)
    found: dict[str, Tensor] = {"mid.pixels": clip_pixels(videos, case.json["image_size"])}
    for name, given in case.json["outputs"].items():
        if not name.startswith("out."):
            continue
        tower = _clip(case, given["blocks"], dtype)
        layers = tower.vision_model.encoder.layers
        _record({f"mid.blocks.{i}": layer for i, layer in enumerate(layers)}, found)
        found[name] = tower(videos)
    return {name: value for name, value in found.items() if name in case}


def _wav2vec2(case: Case) -> Wav2Vec2Encoder:
    """The encoder of the case, or of the case that holds its weights."""
    source = case if "config" in case.json else case.sibling(case.json["weights"])
    encoder = Wav2Vec2Encoder(Wav2Vec2Size.from_config(source.json["config"]))
    encoder.assign(source.weights())
    return encoder


@handles("wan", "wav2vec_base", "wav2vec_large")
def wav2vec_encoder(case: Case) -> dict[str, Any]:
    encoder = _wav2vec2(case)
    wave, given = case["in.wav"], case.json["outputs"]
    frames = case.json["seq_len"]
    plain, resampled = encoder(wave), encoder(wave, frames)
    conv = encoder.conv_features(wave)
    found: dict[str, Any] = {f"mid.plain_hidden.{i}": state for i, state in enumerate(plain)}
    found["mid.conv_features"] = conv
    found["mid.interpolated"] = windows.resample_time(conv.transpose(1, 2), frames)
    found["out.last_hidden"] = resampled[-1]
    found["out.skyreels_stack"] = windows.skyreels_features(resampled)
    found["out.omni_cat"] = windows.omniavatar_features(resampled)
    layers = windows.s2v_features(plain, given["out.s2v_layers"]["rate"])
    found["out.s2v_layers"] = layers
    found["out.s2v_last"] = windows.s2v_features(plain[-1:], given["out.s2v_last"]["rate"])
    for name in case.names("out.bucket_"):
        found[name], clips = _window(layers, given[name], case.json["video_rate"])
        label = name.removeprefix("out.bucket_").split("_")[0]
        if label in case.json["num_repeat"]:
            found[f"json.num_repeat.{label}"] = clips
    return found


def _window(features: Tensor, given: dict[str, Any], rate: float) -> tuple[Tensor, int]:
    if "stride" in given:
        return windows.bucket_by_stride(features, given["stride"], given["batch_frames"], given["m"])
    return windows.bucket_by_fps(features, given["fps"], given["batch_frames"], given["m"], rate)


@handles("wan", "wav2vec_normalise")
def wav2vec_normalise(case: Case) -> dict[str, Tensor]:
    raw, eps = case["in.wav_raw"], case.json["var_eps"]
    wave = normalise_waveform(raw, eps)
    return {
        "out.wav": wave,
        "out.wav_quiet": normalise_waveform(raw * case.json["quiet_factor"], eps),
        "out.last_hidden": _wav2vec2(case)(wave, case.json["seq_len"])[-1],
    }


def _indices(key: str) -> list[int]:
    source_fps, source_frames, target_fps, count = (int(part) for part in key.split("_"))
    return windows.frame_indices(source_fps, source_frames, target_fps, count).tolist()


@handles("wan", "wav2vec_windows")
def wav2vec_windows(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {f"json.sample_indices.{key}": _indices(key) for key in case.json["sample_indices"]}
    for name, given in case.json["windows"].items():
        found[f"out.{name}"], clips = _window(case[given["feat"]], given, case.json["video_rate"])
        found[f"json.windows.{name}.num_repeat"] = clips
    return found


@handles("wan", "wav2vec_sample_indices")
def wav2vec_sample_indices(case: Case) -> dict[str, Any]:
    return {f"json.cases.{key}": _indices(key) for key in case.json["cases"]}


@handles("liveavatar", "audio_bucket")
def audio_bucket(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, given in enumerate(case.json["cases"]):
        states = case[f"in.{given['case']}.feat50"]
        rate = case.json["interpolated_rate"]
        features = windows.s2v_features([state[None] for state in states], rate)
        condition = windows.liveavatar_windows(features, given["fps"], given["batch_frames"], given["m"], rate)
        found[f"mid.{given['case']}.feat30"] = features
        found[f"out.{given['case']}.bucket"] = condition.features
        found[f"json.cases.{i}.T30"] = features.shape[1]
        found[f"json.cases.{i}.num_repeat"] = condition.clips
        found[f"json.cases.{i}.bucket_frames"] = condition.features.shape[-1]
    return found


@handles("liveavatar", "audio_features")
def audio_features(case: Case) -> dict[str, Any]:
    config = case.json
    wave = normalise_waveform(case["in.wav"], config["normalise_eps"])
    states = _wav2vec2(case)(wave[None])
    rate = config["interpolated_rate"]
    features = windows.s2v_features(states, rate)
    condition = windows.liveavatar_windows(features, config["fps"], config["batch_frames"], config["m"], rate)
    return {
        "mid.normalized": wave,
        "mid.feat30": features,
        "out.bucket": condition.features,
        "json.hidden_states": len(states),
        "json.T30": features.shape[1],
        "json.num_repeat": condition.clips,
        "json.bucket_frames": condition.features.shape[-1],
    }
