"""From a training run to the files that the runtime loads: one safetensors file in half precision and a config."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...graphs.models.liveavatar import LiveAvatarConfig
from ...graphs.models.speech import SpeechConfig
from ...graphs.models.wan_vae import WanVae
from .dit_stage import TinySystem
from .recipe import Recipe


def dit_config(recipe: Recipe, speech: SpeechConfig) -> LiveAvatarConfig:
    """LiveAvatar's architecture at the recipe's sizes; the prompt is a constant, so its rows are few and narrow."""
    return LiveAvatarConfig(
        dim=recipe.dim,
        ffn_dim=3 * recipe.dim,
        num_heads=recipe.heads,
        num_layers=recipe.layers,
        text_dim=16,
        text_len=4,
        audio_dim=speech.channels,
        audio_layers=speech.layers,
        audio_inject_layers=tuple(range(0, recipe.layers, 2)),
        rope_dtype=torch.float32,
    )


def export(system: TinySystem, vae: WanVae, recipe: Recipe, folder: Path) -> Path:
    """Write `config.json` and `tiny.safetensors` (float16, keys `dit.*`, `speech.*`, `vae.*`) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"dit.{name}": value for name, value in system.dit.state_dict().items()}
    tensors |= {f"speech.{name}": value for name, value in system.speech.state_dict().items()}
    tensors |= {f"vae.{name}": value for name, value in vae.state_dict().items()}
    save_file({name: value.half().contiguous().cpu() for name, value in tensors.items()}, folder / "tiny.safetensors")
    dit = asdict(system.dit.config) | {"rope_dtype": str(system.dit.config.rope_dtype).removeprefix("torch.")}
    config = {
        "size": [recipe.size, recipe.size],
        "dit": dit,
        "vae": asdict(vae.config),
        "speech": asdict(system.speech.config),
        "mode": {"reference_frames": 5, "reference_index": 1, "motion_frames": recipe.still, "warm_latents": 5},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder
