"""How much work a pass of a model is, counted on the meta device: nothing is computed, the plain graph is only walked.

The counts are of matrix products, convolutions and attention (2 FLOPs a multiply-add), with no allowance for norms,
rotations and other pointwise work.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from ..graphs.models.wan_vae import DecoderState, EncoderState, VaeConfig, WanVae
from ..kernels.dispatch import using
from ..runtime.systems.liveavatar_mode import GenerationMode
from .state import BlockCase, StepCall

META = torch.device("meta")


def count_flops(call: Callable[[], object]) -> float:
    """FLOPs of a call on tensors of any device, through the plain references of the ops."""
    with torch.no_grad(), using(False), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def step_flops(config: LiveAvatarConfig, mode: GenerationMode, grid: tuple[int, int]) -> float:
    """One `forward_block` with a full rolling cache; `grid` latent (rows, columns)."""
    with META:
        dit = LiveAvatar(config)
    with torch.no_grad():
        call = StepCall.prepare(BlockCase.random(dit, replace(mode, steps=1), grid), filled=False)
    return count_flops(lambda: call(call.case.noises[0]))


def decode_flops(config: VaeConfig, latents: int, warm: int, grid: tuple[int, int]) -> float:
    """The next `latents` latent frames of a stream that has decoded `warm` of them."""
    with META:
        vae = WanVae(config)
        state = DecoderState()
        first, following = (torch.empty(1, config.z_dim, n, *grid) for n in (warm, latents))
    with torch.no_grad():
        vae.decode_stream(first, state)
    return count_flops(lambda: vae.decode_stream(following, state))


def encode_flops(config: VaeConfig, frames: int, grid: tuple[int, int]) -> float:
    """The next `frames` frames (a multiple of the temporal factor) of a stream that has encoded its first frame."""
    size = grid[0] * config.spatial_factor, grid[1] * config.spatial_factor
    with META:
        vae = WanVae(config)
        state = EncoderState()
        first, following = (torch.empty(1, 3, n, *size) for n in (1, frames))
    with torch.no_grad():
        vae.encode_stream(first, state)
    return count_flops(lambda: vae.encode_stream(following, state))


def audio_flops(config: LiveAvatarConfig, frames: int) -> float:
    """`encode_audio` of a block's window of `frames` audio frames."""
    with META:
        dit = LiveAvatar(config)
        features = torch.empty(1, config.audio_layers, config.audio_dim, frames)
    return count_flops(lambda: dit.encode_audio(features))
