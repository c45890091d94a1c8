"""A small random model of tiny's architecture as a folder that `load` takes, and a sound for it. Needs no PyAV."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.graphs.models.speech import SpeechConfig, SpeechFrontEnd
from kinora.graphs.models.wan_vae import VaeConfig, WanVae
from safetensors.torch import save_file

RATE = 16_000
SIDE = 64
MODE = {"reference_frames": 1, "reference_index": 0, "motion_frames": 9, "warm_latents": 3}
SPEECH = SpeechConfig(mels=8, channels=8, layers=3, lookahead=3)


def write_model(folder: Path) -> Path:
    """A randomly initialised model of tiny's architecture, in tiny's files."""
    dit_config = LiveAvatarConfig(
        dim=32, ffn_dim=48, num_heads=2, num_layers=2, in_dim=4, out_dim=4, cond_dim=4, freq_dim=16, text_dim=8,
        text_len=2, audio_dim=SPEECH.channels, audio_layers=SPEECH.layers, num_audio_token=2,
        audio_inject_layers=(0, 1), rope_dtype=torch.float32,
    )  # fmt: skip
    zeros, ones = (0.0,) * 4, (1.0,) * 4
    vae_config = VaeConfig(4, 4, (1, 2, 2, 2), 1, (False, True, True), zeros, ones)
    torch.manual_seed(0)
    dit, vae, speech = LiveAvatar(dit_config), WanVae(vae_config), SpeechFrontEnd(SPEECH)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    parts = {"dit": dit, "vae": vae, "speech": speech}
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "tiny.safetensors")
    config = {
        "size": [SIDE, SIDE],
        "dit": asdict(dit_config) | {"rope_dtype": "float32"},
        "vae": asdict(vae_config),
        "speech": asdict(SPEECH),
        "mode": MODE,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sound(seconds: float, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (0.2 * generator.standard_normal(round(seconds * RATE))).astype(np.float32)


def same_frames(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal but for values at the border of two bytes."""
    difference = np.abs(found.astype(int) - wanted)
    return found.shape == wanted.shape and difference.max() <= 1 and difference.mean() < 1e-3
