"""Golden cases of LiveAvatar's transformer, its parts one by one (liveavatar.md, 9)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....graphs.models.layers import sinusoid, unpatchify
from ....graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig, RollingCache
from ....graphs.models.liveavatar_audio import AudioInjector, CausalAudioEncoder
from ....graphs.models.liveavatar_block import Block, Head, SelfAttention
from ....graphs.models.liveavatar_cache import KeyValue, LayerMemory
from ....graphs.models.liveavatar_motion import FramePacker
from ....graphs.models.liveavatar_rope import Segment, frame_table, segment_table
from ....kernels import ops
from ..case import Case
from ..registry import handles

Values = dict[str, Any]
ROPE = torch.float16


def _segments(grids: list[Any]) -> list[Segment]:
    """Golden segments [[start], [end], [span]] with one (f, h, w) row each."""
    found = []
    for (start,), (end,), (span,) in grids:
        count = tuple(e - s for s, e in zip(start, end, strict=True))
        found.append(Segment(tuple(start), count, tuple(span)))
    return found


def _shift_reference(segments: list[Segment], shift: int) -> list[Segment]:
    """Entry 0 is the empty noisy segment, entry 1 the reference."""
    frame, row, column = segments[1].start
    return [segments[0], replace(segments[1], start=(frame + shift, row, column)), *segments[2:]]


def load(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    module.load_state_dict(dict(weights), strict=True)
    return module.eval()


@handles("liveavatar", "rope_tables")
def rope_tables(case: Case) -> Values:
    out: Values = {}
    for item in case.json["cases"]:
        table = segment_table(_segments(item["grids"]), item["head_dim"], ROPE)
        out[f"out.{item['key']}.table"] = table[None]
    apply = case.json["apply"]
    out[apply["output"]] = ops.apply_rope(case[apply["input"]], out[apply["table"]][0])
    return out


@handles("liveavatar", "motioner", "motioner_drop")
@torch.no_grad()
def motioner(case: Case) -> Values:
    config = case.json["config"]
    weights = case.weights()
    packer = FramePacker(
        weights["proj.weight"].shape[1], config["inner_dim"], config["drop_mode"], tuple(config["zip_frame_buckets"])
    )
    load(packer, weights)
    head_dim = config["inner_dim"] // config["num_heads"]
    out: Values = {}
    for item in case.json["cases"]:
        i, last = item["case"], item["add_last_motion"]
        latents = case[f"in.{i}.motion_latents"]
        out[f"out.{i}.tokens"] = packer(latents, last)
        height, width = latents.shape[-2:]
        out[f"out.{i}.rope"] = segment_table(packer.segments(height, width, last), head_dim, ROPE)[None]
    return out


@handles("liveavatar", "audio_encoder")
@torch.no_grad()
def audio_encoder(case: Case) -> Values:
    config = case.json["config"]
    encoder = CausalAudioEncoder(config["dim"], config["num_layers"], config["out_dim"], config["num_token"])
    load(encoder, case.weights())
    features, drop = case["in.features"], case.json["audio_prefix_latents"]
    prefix = features[..., :1].expand(*features.shape[:-1], case.json["audio_prefix_frames"])
    local_all, global_all = encoder.encoder(encoder.mix(torch.cat((prefix, features), -1)))
    local, whole = encoder(features)
    return {
        "out.local_all": local_all,
        "out.global_all": global_all,
        "out.local": local_all[:, drop:],
        "out.global": global_all[:, drop:],
        "mid.local_prefix1": local,
        "mid.global_prefix1": whole,
    }


@handles("liveavatar", "audio_injector_*")
@torch.no_grad()
def audio_injector(case: Case) -> Values:
    j, info = case.json["injector_index"], case.json
    weights = case.weights(prefix="audio_injector.")
    layers = 1 + max(int(name.split(".")[1]) for name in weights)
    dim, adain = case["in.hidden"].shape[-1], any(name.startswith("injector_adain_layers.") for name in weights)
    injector = AudioInjector(dim, info["num_heads"], layers, info["rms_eps"], adain, info["adain_mode"])
    own = injector.state_dict()
    used = {name for name in own if name.split(".")[1] == str(j) and "output_layers" not in name}
    if not used <= weights.keys() <= own.keys():
        raise KeyError(f"injector {j} is incomplete, or the golden holds tensors that the injector has not")
    injector.load_state_dict(weights, strict=False)  # a case may hold only the layer that it tests
    audio = injector.prepare_layer(j, case["in.audio_emb"], case["in.audio_emb_global"])
    mask = case["in.mask"][:, info.get("mask_frames", range(info["grid"][0]))].flatten(1) if "in.mask" in case else None
    return {"out.hidden": injector(j, case["in.hidden"], audio, info["grid"][0], mask)}


def _shell(**sizes: Any) -> LiveAvatar:
    """The model without blocks, for its embeddings."""
    return LiveAvatar(LiveAvatarConfig(num_layers=0, audio_inject_layers=(), **sizes)).eval()


@handles("liveavatar", "time_embedding")
@torch.no_grad()
def time_embedding(case: Case) -> Values:
    dim, freq_dim = case.json["dim"], case.json["freq_dim"]
    model = _shell(dim=dim, num_heads=1, freq_dim=freq_dim)
    load(model.time_embedding, case.weights(prefix="time_embedding."))
    load(model.time_projection, case.weights(prefix="time_projection."))
    state = model.embed_time(case["in.t"][None])
    return {"mid.sinusoid": sinusoid(case["in.t"], freq_dim).float(), "out.e": state.e[0], "out.e0": state.e0[0]}


@handles("liveavatar", "text_embedding")
@torch.no_grad()
def text_embedding(case: Case) -> Values:
    weights = case.weights(prefix="text_embedding.")
    dim, text_dim = weights["0.weight"].shape
    model = _shell(dim=dim, num_heads=1, text_dim=text_dim, text_len=case.json["text_len"])
    load(model.text_embedding, weights)
    return {"out.text": model.text_tokens(case["in.context"])}


@handles("liveavatar", "head")
@torch.no_grad()
def head(case: Case) -> Values:
    patch = tuple(case.json["patch"])
    module = Head(case["in.x"].shape[-1], case.json["out_dim"] * patch[0] * patch[1] * patch[2], case.json["eps"])
    y = load(module, case.weights())(case["in.x"], case["in.e"][None])
    return {"out.y": y, "out.unpatchified": unpatchify(y, tuple(case.json["grid"]), patch)[0]}


@dataclass
class Ring:
    """One layer's ring and condition keys, for the cases that test a single layer."""

    k: Tensor
    v: Tensor
    per_frame: int
    segments: list[Segment]
    condition: list[KeyValue]

    @classmethod
    def of(cls, case: Case, head_dim: int, dtype: torch.dtype = torch.float32) -> "Ring":
        info = case.json
        k, v = (torch.zeros(1, info["cache_tokens"], info["num_heads"], head_dim, dtype=dtype) for _ in range(2))
        return cls(k, v, info["h"] * info["w"], _segments(info["cond_grids"]), [])

    @property
    def head_dim(self) -> int:
        return self.k.shape[-1]

    def prefill(self, attention: SelfAttention) -> Any:
        rope = segment_table(self.segments, self.head_dim, ROPE)
        return partial(attention.prefill, rope=rope, store=self.condition.append)

    def stream(self, attention: SelfAttention, case: Case, start: int, shift: int, local: int = -1) -> Any:
        info = case.json
        frames, grid = info["frames_per_block"], (info["h"], info["w"])
        cache = RollingCache(self.k[None], self.v[None], self.per_frame)
        slot = cache.slot(start // self.per_frame, frames, local)
        cond_rope = segment_table(_shift_reference(self.segments, shift), self.head_dim, ROPE)
        memory = LayerMemory(KeyValue(self.k, self.v), slot, self.condition[0], cond_rope)
        rope = frame_table(start // self.per_frame, frames, grid, self.head_dim, ROPE)
        return partial(attention.stream, rope=rope, memory=memory)


def pad_rows(x: Tensor, like: Tensor) -> Tensor:
    """Upstream keeps more rows than condition tokens; the rest is zero."""
    return nn.functional.pad(x, (0, 0, 0, 0, 0, like.shape[1] - x.shape[1]))


def _attention(case: Case) -> SelfAttention:
    dim = case["in.prefill.x"].shape[-1]
    attention = SelfAttention(dim, case.json["num_heads"], case.json["eps"])
    load(attention, case.weights())
    return attention


@handles("liveavatar", "self_attention_cached")
@torch.no_grad()
def self_attention_cached(case: Case) -> Values:
    attention = _attention(case)
    x = case["in.prefill.x"]
    ring = Ring.of(case, x.shape[-1] // case.json["num_heads"])
    out: Values = {"out.prefill.y": ring.prefill(attention)(x)}
    for name, part in zip("kv", ring.condition[0], strict=True):
        out[f"out.prefill.cond_{name}"] = pad_rows(part, case.tensors[f"out.prefill.cond_{name}"])
    for step in case.json["steps"]:
        b, local = step["block"], case.json["local_attn_size"]
        attend = ring.stream(attention, case, step["current_start"], step["ref_shift"], local)
        out[f"out.{b}.y"] = attend(case[f"in.{b}.x"])
    return out | {"out.final.k": ring.k, "out.final.v": ring.v}


@handles("liveavatar", "self_attention_local")
@torch.no_grad()
def self_attention_local(case: Case) -> Values:
    attention = _attention(case)
    x = case["in.prefill.x"]
    out: Values = {}
    for item in case.json["cases"]:
        ring = Ring.of(case, x.shape[-1] // case.json["num_heads"])
        ring.prefill(attention)(x)
        for step in item["steps"]:
            b, local = step["block"], item["local_attn_size"]
            attend = ring.stream(attention, case, step["current_start"], step["ref_shift"], local)
            out[f"out.local{local}.{b}.y"] = attend(case[f"in.{b}.x"])
    return out


@handles("liveavatar", "block")
@torch.no_grad()
def block(case: Case) -> Values:
    info, x = case.json, case["in.prefill.x"]
    module = Block(x.shape[-1], info["ffn_dim"], info["num_heads"], info["eps"])
    load(module, case.weights())
    ring = Ring.of(case, x.shape[-1] // info["num_heads"])
    text = module.cross_attn.context(case["in.context"])
    out: Values = {}
    out["out.prefill.y"] = module(x, case["in.e0_prefill"][:, :1, :, 1], text, ring.prefill(module.self_attn))
    for b, (start, shift) in enumerate(zip(info["current_start_per_block"], info["ref_shift_per_block"], strict=True)):
        e0 = case[f"in.{b}.e0"][:, :, :, 0]
        attend = ring.stream(module.self_attn, case, start, shift)
        stages = run_stages(module, case[f"in.{b}.x"], e0, text, attend, {})
        out |= {f"mid.{b}.{name}": value for name, value in stages.items() if f"mid.{b}.{name}" in case}
        out[f"out.{b}.y"] = stages["y"]
    return out


def run_stages(
    module: Block, x: Tensor, e0: Tensor, text: KeyValue, attend: Any, given: Mapping[str, Tensor]
) -> Values:
    """Every stage of a block; `given` replaces the result of a stage for the ones after it (teacher forcing)."""
    stages: Values = {"norm1": ops.layer_norm(x)}

    def keep(name: str, value: Tensor) -> Tensor:
        stages[name] = value
        return given.get(name, value)

    hooks = [
        getattr(module, name).register_forward_hook(lambda _m, _i, value, name=name: keep(name, value))
        for name in ("norm3", "cross_attn", "ffn")
    ]
    try:
        stages["y"] = module(x, e0, text, lambda tokens: keep("self_attn", attend(tokens)))
    finally:
        for hook in hooks:
            hook.remove()
    y, crossed = (given.get(name, stages[name]) for name in ("self_attn", "cross_attn"))
    stages["norm2"] = ops.layer_norm(ops.gated_residual(x, y, module.modulate(e0).gate1) + crossed)
    return stages
