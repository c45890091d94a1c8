"""Parity of whole generations of plain Wan from recorded noise (wan.md, 3.5 to 3.8)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....graphs.models.wan_vae import WanVae, infer_config
from ....runtime.encoders.clip import ClipSize, ClipVision
from ....runtime.systems.wan import WanSettings, WanVideo, image_to_unit_range, size_for_image
from ..case import Case
from ..registry import handles
from .wan_dit import build_model


def load_parts(case: Case) -> WanVideo:
    """The pipeline of a case: one model or two experts, the VAE, and for image to video 2.1 the picture encoder."""
    config = {**case.json["dit"], "in_dim": case.json["in_dim"], "img_dim": case.json.get("img_dim")}
    prefixes = case.json["weights_prefix"]
    state = case.weights(case.json["weights_vae"], prefixes["vae"])
    vae = WanVae(infer_config(state))
    vae.load_state_dict(state, strict=True)
    clip = None
    if "clip" in case.json:
        p = case.json["clip"]
        size = ClipSize(
            p["dim"], p["heads"], p["layers"], int(p["dim"] * p["mlp_ratio"]), p["image_size"], p["patch_size"]
        )
        clip = ClipVision(size)
        clip.assign({f"visual.{key}": value for key, value in case.weights(prefix=prefixes["clip"]).items()})
    if "dit" in prefixes:
        return WanVideo(build_model(config, case.weights(prefix=prefixes["dit"])), vae, clip=clip)
    low, high = (build_model(config, case.weights(prefix=prefixes[part])) for part in ("low_noise", "high_noise"))
    return WanVideo(low, vae, high_noise=high, clip=clip)


def settings_of(case: Case, output: str) -> WanSettings:
    """Sampling parameters of one output; a pair of guidance scales may differ by output."""
    guidance: Any = case.json.get("guide_scale_low_high", case.json.get("guide_scale"))
    if isinstance(guidance, dict):
        guidance = guidance[output.rsplit(".", 1)[-1]]
    low, high = guidance if isinstance(guidance, list) else (guidance, guidance)
    solver = case.json["outputs"][output]["sample_solver"]
    return WanSettings(case.json["steps"], case.json["shift"], (low, high), solver, case.json.get("boundary"))


@handles("wan", "e2e_*")
def generation(case: Case) -> Mapping[str, Tensor]:
    """Every video of the .json, and what the picture becomes before the first step."""
    pipeline = load_parts(case)
    frames = case.json.get("mask_frames", case.json["frame_num"])  # image to video 2.1 ignores frame_num
    found: dict[str, Tensor] = {}
    for name, p in case.json["outputs"].items():
        if not isinstance(p, dict):
            continue
        arguments = {"frames": frames, "settings": settings_of(case, name), "noise": case[p["noise"]]}
        prompts = (case[p["context"]], case[p["context_null"]])
        if "image" not in p:
            found[name] = pipeline.text_to_video(*prompts, size=tuple(case.json["size_wh"]), **arguments)
            continue
        image, area = case[p["image"]].numpy(), case.json["max_area"]
        found[name] = pipeline.image_to_video(image, *prompts, max_area=area, **arguments)
        pixels = image_to_unit_range(image)
        rows, columns = pixels.shape[1:]
        condition = pipeline.image_condition(pixels, frames, *size_for_image(rows, columns, area))
        found["mid.first_dit_input"] = torch.cat((case[p["noise"]], condition.y))[None]
        if condition.clip_features is not None:
            found["mid.clip_fea"] = condition.clip_features
    return found
