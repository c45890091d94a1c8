"""LiveAvatar's use of the VAE: reference and motion latents, streaming decode (liveavatar.md, 3.2 and 3.7)."""

from typing import Any

import torch
from torch import Tensor

from ....graphs.models.wan_vae import DecoderState, infer_config
from ..case import Case
from ..registry import handles
from .wan_vae import load_vae, vae_config


@handles("liveavatar", "vae_weights")
def weights(case: Case) -> dict[str, Any]:
    """A file of weights without outputs: the sizes read from it are the stated ones, and it loads completely."""
    config = infer_config(case.weights())
    vae = load_vae(config, case.weights())
    if not torch.isfinite(vae.decode(vae.encode(torch.zeros(1, 3, 5, 16, 24)))).all():
        raise AssertionError("the VAE of this file gives values that are not finite")
    temporal = next(name for name in case.json["config"] if name.endswith("_downsample"))
    return {
        "json.config.dim": config.dim,
        "json.config.z_dim": config.z_dim,
        "json.config.dim_mult": list(config.dim_mult),
        "json.config.num_res_blocks": config.num_res_blocks,
        f"json.config.{temporal}": list(config.temporal_downsample),
    }


@handles("liveavatar", "vae_stream")
def stream(case: Case) -> dict[str, Tensor]:
    vae = load_vae(vae_config(case.json["config"]), case.weights())
    image, z = case["in.image"], case["in.z"]
    found = {}
    for name, frames in case.json["frames"].items():
        latents = vae.encode(image.expand(-1, -1, frames, -1, -1))
        if name == "out.ref_single":
            index = case.json["ref_single_latent_index"]
            latents = latents[:, :, index : index + 1]
        found[name] = latents[:, :, -case.tensors[name].shape[2] :]
    motion = found[case.json["motion_context"]]
    kept = case.json["offline_keep_frames"]
    found[f"out.offline_last{kept}"] = vae.decode(torch.cat((motion, z), 2))[:, :, -kept:]
    state = DecoderState()
    vae.decode_stream(motion[:, :, : case.json["stream_warm_latents"]], state)
    for i, block in enumerate(z.split(case.json["stream_block_latents"], 2)):
        found[f"out.stream_block{i}"] = vae.decode_stream(block, state)
    return found
