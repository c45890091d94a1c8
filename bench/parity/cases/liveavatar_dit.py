"""Golden cases of LiveAvatar's transformer: whole passes, mixed precision, FP8 (liveavatar.md, 9)."""

from functools import partial

import torch
from torch import Tensor, nn

from ....graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig, RollingCache, ref_shift
from ....graphs.quantize import Fp8Linear, quantize_linears
from ....kernels import ops
from ..case import Case
from ..registry import handles
from .liveavatar_units import Ring, Values, load, pad_rows, run_stages


def load_model(case: Case, dtype: torch.dtype = torch.float32) -> LiveAvatar:
    info = case.json
    weights = case.weights()
    frames = info.get("num_frame_per_block", info["frames_per_block"])  # the first is the training mask's own
    config = LiveAvatarConfig.from_published(
        info["config"],
        audio_layers=weights["casual_audio_encoder.weights"].shape[1],
        num_frames_per_block=frames,
        cache_frames=info.get("cache_frames", 4 * frames),
    )
    model = LiveAvatar(config)
    load(model, weights)
    return model.to(dtype)


@handles("liveavatar", "model", "model_rect", "model_drop_motion", "model_actors", "model_bf16", "model_fp8")
@torch.no_grad()
def model(case: Case) -> Values:
    info = case.json
    dtype = torch.bfloat16 if "weights_dtype" in info else torch.float32
    dit = load_model(case, dtype)
    out: Values = {}
    if "quantised_modules" in info:
        out["json.quantised_modules"] = sorted(quantize_linears(dit, ignore=tuple(info["ignore_keys"])))
    text = dit.embed_text(case["in.context"])
    condition = dit.prefill(
        case["in.ref_latents"],
        case["in.motion_latents"],
        text,
        drop_motion_frames=info.get("drop_motion_frames", False),
        add_last_motion=info["add_last_motion_argument"],
    )
    for part, name in enumerate("kv"):
        for key in case.names(f"out.sink.cond_{name}."):
            layer = key.rsplit(".", 1)[1]
            kept = condition.layers[-1 if layer == "last" else int(layer)][part]
            out[key] = pad_rows(kept, case.tensors[key])
    cache = RollingCache.allocate(dit.config, condition.grid[0] * condition.grid[1], dtype=dit.dtype)
    actors = case["in.mask"] if "in.mask" in case else None  # noqa: SIM401
    single = "steps" not in info
    for step in [info] if single else info["steps"]:
        b = "" if single else f"{step['block']}."
        start = step["current_start"] // cache.tokens_per_frame
        audio = dit.encode_audio(case[f"in.{b}audio_input"])
        hooks = []
        for i, block in enumerate(dit.blocks):
            if f"mid.{b}block{i}" in case:
                store = partial(out.__setitem__, f"mid.{b}block{i}")
                hooks.append(block.register_forward_hook(lambda _m, _i, value, store=store: store(value)))
        flow = dit.forward_block(
            case[f"in.{b}x"][None],
            dit.embed_time(torch.full((1, dit.config.num_frames_per_block), step["t"])),
            text,
            audio,
            condition,
            cache,
            start,
            ref_shift(start, step["relative_dist"]),
            cond_states=case[f"in.{b}cond_states"],
            actor_mask=actors,
        )
        for hook in hooks:
            hook.remove()
        out[f"out.{b}flow"] = flow[0]
        tokens = {f"mid.{b}audio_local": audio.local, f"mid.{b}audio_global": audio.whole}
        out |= {name: value for name, value in tokens.items() if name in case}
    for name, ring in (("k", cache.k), ("v", cache.v)):
        for key in case.names(f"out.final.{name}."):
            layer = key.rsplit(".", 1)[1]
            out[key] = ring[-1 if layer == "last" else int(layer)]
    return out


@handles("liveavatar", "block_bf16")
@torch.no_grad()
def block_bf16(case: Case) -> Values:
    """Stage by stage: each value from the recorded ones that the .json's `stages` names."""
    info, half = case.json, torch.bfloat16
    dit = load_model(case, half)
    marked = set(info["bf16"])

    def read(name: str) -> Tensor:
        return case.tensors[name].to(half if name in marked else torch.float32)

    index, j, frames = info["block_idx"], info["injector_index"], info["frames_per_block"]
    module = dit.blocks[index]
    ring = Ring.of(case, dit.config.head_dim, half)
    text = module.cross_attn.context(read("in.context"))
    x, e0 = read("in.prefill.x"), read("in.e0_prefill")[:, :1, :, 1]
    out: Values = {"out.prefill.y": module(x, e0, text, ring.prefill(module.self_attn))}
    for name, part in zip("kv", ring.condition[0], strict=True):
        out[f"out.prefill.cond_{name}"] = pad_rows(part, case.tensors[f"out.prefill.cond_{name}"])
    for b, (start, shift) in enumerate(zip(info["current_start_per_block"], info["ref_shift_per_block"], strict=True)):
        given = {name: read(f"mid.{b}.{name}") for name in ("self_attn", "norm3", "cross_attn", "ffn")}
        attend = ring.stream(module.self_attn, case, start, shift)
        stages = run_stages(module, read(f"in.{b}.x"), read(f"in.{b}.e0")[:, :, :, 0], text, attend, given)
        out |= {f"mid.{b}.{name}": value for name, value in stages.items() if name != "y"}
        out[f"out.{b}.y"] = stages["y"]
        audio = dit.audio_injector.prepare_layer(j, read(f"in.{b}.audio_emb"), read(f"in.{b}.audio_emb_global"))
        mask = read(f"in.{b}.mask")[:, :frames].flatten(1) if info["actors_per_block"][b] > 1 else None
        injection = dit.audio_injector.injector[j]
        inputs: list[Tensor] = []
        hooks = (
            injection.register_forward_pre_hook(lambda _m, args, inputs=inputs: inputs.append(args[0])),
            injection.register_forward_hook(lambda _m, _i, _value, b=b: read(f"mid.{b}.injector")),
        )
        out[f"out.{b}.injected"] = dit.audio_injector(j, read(f"out.{b}.y"), audio, frames, mask)
        for hook in hooks:
            hook.remove()
        out[f"mid.{b}.adain"] = inputs[0]
        out[f"mid.{b}.injector"] = injection(read(f"mid.{b}.adain"), audio.context)
        out[f"out.{b}.head"] = dit.head(read(f"out.{b}.injected"), read(f"in.{b}.e")[None])
    return out | {name: part for name, part in (("out.final.k", ring.k), ("out.final.v", ring.v)) if name in case}


@handles("liveavatar", "fp8_linear")
@torch.no_grad()
def fp8_linear(case: Case) -> Values:
    weights = case.weights()
    outputs, inputs = weights["weight"].shape
    linear = nn.Linear(inputs, outputs).to(torch.bfloat16)
    load(linear, weights)
    layer = Fp8Linear(linear)
    out: Values = {"out.weight_fp8_bits": layer.weight.view(torch.uint8), "out.weight_scale": layer.weight_descale}
    for name in case.names("in."):
        i, x = name.split(".")[1], case[name]
        x8, descale = ops.quantize_fp8(x.flatten(0, -2))
        out[f"mid.{i}.x_fp8_bits"], out[f"mid.{i}.x_scale"] = x8.view(torch.uint8), descale
        out[f"out.{i}.y_emulated"] = layer(x)
    return out
