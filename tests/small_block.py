"""A small LiveAvatar for blocks that are compiled and captured: its sizes, inputs, and a run of blocks."""

from collections.abc import Sequence

import torch
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.runtime.placement.captured import CapturedBlock
from kinora.runtime.placement.single import SingleDevice
from kinora.runtime.systems.liveavatar_mode import GenerationMode
from kinora.runtime.systems.liveavatar_step import BlockInputs
from torch import Tensor

GRID = (8, 4)  # latent rows, columns
CONFIG = LiveAvatarConfig(
    dim=128, ffn_dim=192, num_heads=2, num_layers=3, text_dim=16, text_len=8, audio_dim=32, audio_layers=3,
    audio_inject_layers=(0, 2),
)  # fmt: skip
MODE = GenerationMode(steps=2, cache_latents=6)


def model(dtype: torch.dtype, config: LiveAvatarConfig = CONFIG) -> LiveAvatar:
    torch.manual_seed(0)
    dit = LiveAvatar(config).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5))
    return dit.to(dtype)


def latents(frames: int) -> Tensor:
    return torch.randn(1, 16, frames, *GRID)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def blocks(count: int, actors: int = 1, pose: bool = False) -> list[tuple[Tensor, BlockInputs]]:
    mask = None if actors == 1 else torch.rand(actors, 12, GRID[0] // 2, GRID[1] // 2, 1)
    return [
        (
            latents(3),
            BlockInputs(index, torch.randn(actors, 3, 32, 12), (5 + index, 9), latents(3) if pose else None, mask),
        )
        for index in range(count)
    ]


def run(
    denoiser: SingleDevice | CapturedBlock, inputs: Sequence[tuple[Tensor, BlockInputs]], dit: LiveAvatar
) -> Tensor:
    torch.manual_seed(1)
    made = []
    denoiser.condition(latents(1), latents(5))
    for x, block in inputs:
        if block.index == 5:
            denoiser.condition(latents(1), latents(5))
        made.append(denoiser.denoise(x.to(dit.dtype), block).float())
    return torch.cat(made)
