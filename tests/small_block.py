"""A small LiveAvatar for blocks that are compiled and captured: its sizes, inputs, and the error of a result."""

import torch
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.runtime.systems.liveavatar_mode import GenerationMode
from torch import Tensor

GRID = (8, 4)  # latent rows, columns
CONFIG = LiveAvatarConfig(
    dim=128, ffn_dim=192, num_heads=2, num_layers=3, text_dim=16, text_len=8, audio_dim=32, audio_layers=3,
    audio_inject_layers=(0, 2),
)  # fmt: skip
MODE = GenerationMode(steps=2, cache_latents=6)


def model(dtype: torch.dtype) -> LiveAvatar:
    torch.manual_seed(0)
    dit = LiveAvatar(CONFIG).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5))
    return dit.to(dtype)


def latents(frames: int) -> Tensor:
    return torch.randn(1, 16, frames, *GRID)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
