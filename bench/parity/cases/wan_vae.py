"""Wan 2.1 VAE: layers, whole clips, streams, tiles and mixed precision (wan.md, 2.1)."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....graphs.models.wan_vae import (
    BF16_AUTOCAST,
    BF16_MODULE,
    WAN21_VAE,
    DecoderState,
    EncoderState,
    VaeConfig,
    WanVae,
)
from ....graphs.models.wan_vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    ChannelRmsNorm,
    Downsample,
    ResidualBlock,
    SlotCursor,
    Upsample,
)
from ....graphs.models.wan_vae_tiled import TILE_SIZE, TILE_STRIDE, decode_tiled, encode_tiled, ramp
from ....kernels import ops
from ..case import Case
from ..registry import handles


def vae_config(values: dict[str, Any]) -> VaeConfig:
    """The configuration in a golden .json (`temperal_downsample` is LiveAvatar's spelling)."""
    temporal = values.get("temporal_downsample") or values["temperal_downsample"]
    return replace(
        WAN21_VAE,
        dim=values["dim"],
        z_dim=values["z_dim"],
        dim_mult=tuple(values["dim_mult"]),
        num_res_blocks=values["num_res_blocks"],
        temporal_downsample=tuple(temporal),
    )


def load_vae(config: VaeConfig, weights: dict[str, Tensor]) -> WanVae:
    vae = WanVae(config)
    vae.load_state_dict(weights, strict=True)
    return vae.eval().requires_grad_(False)


def _vae(case: Case) -> WanVae:
    return load_vae(vae_config(case.json), case.weights())


def _load(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights, strict=True)
    return module.eval().requires_grad_(False)


@handles("wan", "keys_wan21_vae")
def keys(case: Case) -> dict[str, Any]:
    with torch.device("meta"):
        vae = WanVae()
    state = vae.state_dict()
    return {
        "json.keys": [[name, list(value.shape)] for name, value in state.items()],
        "json.n_keys": len(state),
        "json.n_params": sum(value.numel() for value in state.values()),
    }


@handles("wan", "vae_causal_conv")
def causal_conv(case: Case) -> dict[str, Tensor]:
    found = {}
    for name, output in case.json["outputs"].items():
        layer = case.json["layers"][output["layer"]]
        weights = case.weights(prefix=f"{output['layer']}.")
        history = case[output["cache"]] if output["cache"] else None
        geometry = tuple(layer["stride"]), tuple(layer["padding"])
        arguments = (case[output["x"]], weights["weight"], weights["bias"], history, *geometry)
        found[name] = ops.causal_conv3d(*arguments)
    return found


def _split(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(x[:, :, : sum(sizes)].split(sizes, 2))


@handles("wan", "vae_units")
def units(case: Case) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, output in case.json["outputs"].items():
        weights, x = case.weights(prefix=f"{output['weights']}."), case[output["x"]]
        if output["op"] == "channel_rms_norm":
            x = x[:, :, output["frame"]] if "frame" in output else x
            norm = _load(ChannelRmsNorm(x.shape[1], weights["gamma"].dim() + 1), weights)
            found[name] = norm(x)
        elif output["op"] == "attention_block":
            found[name] = _load(AttentionBlock(x.shape[1]), weights)(x)
        else:
            dim_out, dim_in = weights["residual.2.weight"].shape[:2]
            block = _load(ResidualBlock(dim_in, dim_out), weights)
            if not output["slots"]:
                found[name] = block(x, SlotCursor(()))
                continue
            slots: list[Tensor] = []
            for i, part in enumerate(_split(x, output["chunk_sizes"])):
                cursor = SlotCursor(slots)
                found[f"{name}.{i}"] = block(part, cursor)
                slots = cursor.slots
                found |= _stored_slots(case, output["slots_after_chunk"].replace("<chunk>", str(i)), slots)
    return found


def _as_stored(case: Case, key: str, slot: Tensor) -> Tensor:
    """Our slots always hold all frames of history; the original's hold fewer at the start, and ours are zero there."""
    kept = case.tensors[key].shape[2]
    missing = slot[:, :, : slot.shape[2] - kept]
    if missing.any():
        raise AssertionError(f"{key}: frames before the start of the stream are not zero")
    return slot[:, :, -kept:]


def _stored_slots(case: Case, pattern: str, slots: list[Tensor]) -> dict[str, Tensor]:
    """The recorded ones of `slots` by golden name; a marker `<name>.str` stands for a slot that holds nothing yet."""
    found = {}
    for j, slot in enumerate(slots):
        key = pattern.replace("<slot>", str(j))
        if f"{key}.str" in case:
            found[f"{key}.str"] = slot.abs().amax().view(1)  # ours is a history of zeros
        elif key in case:
            found[key] = _as_stored(case, key, slot)
    return found


@handles("wan", "vae_resample_*")
def resample(case: Case) -> dict[str, Tensor]:
    weights = case.weights()
    kind, temporal = case.json["mode"][:-2], case.json["mode"].endswith("3d")
    layer = (Upsample if kind == "upsample" else Downsample)(weights["resample.1.weight"].shape[1], temporal)
    _load(layer, weights)
    whole, chunks = case.json["outputs"]["out.nocache"], case.json["outputs"]["out.chunks"]
    found = {"out.nocache": layer.spatial(case[whole["x"]])}
    slots: list[Tensor] = []
    for i, part in enumerate(_split(case[chunks["x"]], chunks["chunk_sizes"])):
        cursor = SlotCursor(slots if temporal else (torch.empty(0),) * i)
        found[f"out.chunks.{i}"] = layer(part, cursor)
        slots = cursor.slots
        found |= _stored_slots(case, chunks["slot_after_chunk"].replace("<chunk>", str(i)), slots)
    return found


@handles("wan", "vae_encode_t*")
def encode(case: Case) -> dict[str, Tensor]:
    vae = _vae(case)
    outputs = case.json["outputs"].items()
    return {name: vae.encode(case[output["x"]], normalised=output["normalised"]) for name, output in outputs}


@handles("wan", "vae_decode_t*")
def decode(case: Case) -> dict[str, Tensor]:
    vae = _vae(case)
    outputs = case.json["outputs"].items()
    return {name: vae.decode(case[output["z"]], clamp=output["clamp"]) for name, output in outputs}


@handles("wan", "vae_stream_decode")
def stream_decode(case: Case) -> dict[str, Tensor]:
    vae, state, found = _vae(case), DecoderState(), {}
    calls, whole, following = (case.json["outputs"][f"out.{n}"] for n in ("calls", "whole", "next_without_reset"))
    for i, part in enumerate(_split(case[calls["z"]], calls["latents_per_call"])):
        found[f"out.calls.{i}"] = vae.decode_stream(part, state, clamp=calls["clamp"])
        found |= _stored_slots(case, calls["slots_after_call"].replace("<call>", str(i)), state.slots)
    found["out.whole"] = vae.decode(case[whole["z"]], clamp=whole["clamp"])
    found["out.next_without_reset"] = vae.decode_stream(case[following["z"]], state, clamp=following["clamp"])
    return found


def _encode_call(vae: WanVae, video: Tensor, state: EncoderState, *, normalised: bool) -> Tensor:
    """One call as the original makes it: frames that complete no latent frame are dropped, ours would wait."""
    latents = vae.encode_stream(video, state, normalised=normalised)
    state.pending = None
    return latents


@handles("wan", "vae_stream_encode")
def stream_encode(case: Case) -> dict[str, Tensor]:
    vae, state, found = _vae(case), EncoderState(), {}
    calls = case.json["outputs"]["out.calls"]
    for i, part in enumerate(_split(case[calls["x"]], calls["frames_per_call"])):
        found[f"out.calls.{i}"] = _encode_call(vae, part, state, normalised=calls["normalised"])
    return found | _stored_slots(case, calls["slots_after_last_call"], state.slots)


@handles("wan", "vae_stream_encode_next")
def stream_encode_next(case: Case) -> dict[str, Tensor]:
    vae, found = _vae(case), {}
    states: dict[str, EncoderState] = {}
    for name, output in case.json["outputs"].items():
        state = states[output["continues"]] if "continues" in output else EncoderState()
        found[name] = _encode_call(vae, case[output["x"]], state, normalised=output["normalised"])
        states[name] = state
    return found


@handles("wan", "vae_tiled")
def tiled(case: Case) -> dict[str, Any]:
    vae, found = _vae(case), {}
    size, stride = tuple(case.json["tile_size"]), tuple(case.json["tile_stride"])
    for name, output in case.json["outputs"].items():
        if output.get("op") == "decode":
            z = case[output["z"]][None]
            found[name] = decode_tiled(vae, z, size, stride) if output["tiled"] else vae.decode(z)
        elif output.get("op") == "encode":
            found[name] = encode_tiled(vae, case[output["x"]][None], size, stride)
        else:
            for key in case.names(f"{name}."):
                at_start, at_end = (side == "1" for side in key.rsplit(".lb", 1)[1].split("rb"))
                found[key] = ramp(output["length"], output["border"], at_start, at_end)
    return {**found, "json.default_tile_size": list(TILE_SIZE), "json.default_tile_stride": list(TILE_STRIDE)}


class _UnroundedSlots:
    """Histories in the dtype of the layers' inputs, as the original keeps them; ours are rounded as the layer does."""

    def __init__(self, network: nn.Module):
        self.slots: dict[int, Tensor] = {}
        for module in network.modules():
            if isinstance(module, CausalConv3d):
                module.register_forward_pre_hook(self._see)

    def _see(self, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(arguments) == 2:
            x, cursor = arguments
            index = len(cursor.slots)
            self.slots[index] = ops.next_history(x, self.slots.get(index))


@handles("wan", "vae_bf16_*")
def mixed_precision(case: Case) -> dict[str, Tensor]:
    flow = BF16_MODULE if case.json["autocast"] == "off" else BF16_AUTOCAST
    vae = _vae(case).set_precision(flow)
    mean, inverse = vae.latent_scale()
    outputs, z = case.json["outputs"], case[case.json["outputs"]["out.decode"]["z"]][None]
    found = {
        "out.scale.0": mean.flatten(),
        "out.scale.1": inverse.flatten(),
        "out.decode": vae.decode(z, clamp=outputs["out.decode"]["clamp"])[0],
        "out.encode": vae.encode(case[outputs["out.encode"]["x"]][None], normalised=True)[0],
    }
    if stream := outputs.get("out.stream"):
        state, unrounded = DecoderState(), _UnroundedSlots(vae.decoder)
        for i, part in enumerate(_split(z, stream["latents_per_call"])):
            found[f"out.stream.{i}"] = vae.decode_stream(part, state, clamp=stream["clamp"])[0]
        for key in case.names("mid.slots."):
            index = int(key.rsplit(".", 1)[1])
            if not torch.equal(unrounded.slots[index].to(flow.dtype), state.slots[index]):
                raise AssertionError(f"slot {index} is not what its layer saw last")
            found[key] = _as_stored(case, key, unrounded.slots[index])
    return {**found, **_stages(case, vae, z)}


def _stages(case: Case, vae: WanVae, z: Tensor) -> dict[str, Tensor]:
    """Every stage of the decoder, fed with the golden's previous stage; slots from our run over the frames before."""
    found = {"mid.conv2": vae.conv2(vae.denormalise(z.to(vae.precision.latents)))}
    decoder = vae.decoder
    slots: list[Tensor] = []
    recorded = set(case.json["mid_frames"])
    for frame in range(max(recorded) + 1):
        cursor = SlotCursor(slots)
        prefix = f"mid.frame{frame}."
        x = case.tensors["mid.conv2"][:, :, frame : frame + 1].to(vae.precision.dtype)
        if frame not in recorded:
            decoder(x, cursor)
            slots = cursor.slots
            continue

        def step(name: str, y: Tensor, prefix: str = prefix) -> Tensor:
            found[prefix + name] = y
            # stored up-cast; it re-enters in the dtype it had
            return case.tensors[prefix + name].to(y.dtype)

        x = step("conv1", decoder.conv1(x, cursor))
        for group in ("middle", "upsamples"):
            for i, block in enumerate(getattr(decoder, group)):
                x = step(f"{group}.{i}", block(x, cursor))
        x = step("head.0", decoder.head["0"](x))
        x = step("head.1", F.silu(x))
        step("head.2", decoder.head["2"](x, cursor))
        slots = cursor.slots
    return found
