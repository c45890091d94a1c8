"""Where the variants "kinora" and "batched" come from: the one place that knows the entry points of the fast path.

All are in `runtime.placement`: `captured` makes a whole denoising block one CUDA graph, in place of `single`,
`batched_steps` the steps of consecutive blocks;
`captured_vae` makes the VAE's streams such graphs; `engines.CapturedPlacement` lends both to the sessions of an avatar,
as `load` does on CUDA. Without a GPU each is Unavailable.
"""

import torch
from torch import Tensor

from ..graphs.models.liveavatar import LiveAvatar
from ..graphs.models.wan_vae import WanVae
from ..runtime.placement.captured import CapturedBlock
from ..runtime.placement.captured_vae import CapturedDecoder, CapturedEncoder
from ..runtime.placement.engines import CapturedPlacement
from ..runtime.placement.static_stream import StaticStream
from ..runtime.systems.liveavatar import ImmediateDenoiser, LiveAvatarSystem
from ..runtime.systems.liveavatar_mode import GenerationMode
from .harness.run import Unavailable


def captured_block(dit: LiveAvatar, prompt: Tensor, mode: GenerationMode, grid: tuple[int, int]) -> ImmediateDenoiser:
    """As `SingleDevice(dit, prompt, mode, grid)`, captured."""
    need_gpu("CapturedBlock", dit.device)
    return CapturedBlock(dit, prompt, mode, grid)


def captured_decoder(vae: WanVae, grid: tuple[int, int], latents: int) -> CapturedDecoder:
    """`decode_stream` of latents of (rows, columns), captured, `latents` latent frames a step."""
    need_gpu("CapturedDecoder", next(vae.parameters()).device)
    return CapturedDecoder(vae, grid, latents)


def captured_encoder(vae: WanVae, size: tuple[int, int], latents: int) -> CapturedEncoder:
    """`encode_stream` of frames of (height, width), captured, for `latents` latent frames a step."""
    need_gpu("CapturedEncoder", next(vae.parameters()).device)
    return CapturedEncoder(vae, size, latents)


def captured_placement(system: LiveAvatarSystem, kind: type[StaticStream]) -> CapturedPlacement:
    """What `load` gives an avatar on CUDA: with `CapturedBlock`, or with `BatchedSteps` for placement "batched"."""
    need_gpu("CapturedPlacement", system.dit.device)
    return CapturedPlacement(system, kind)


def need_gpu(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable(f"{name} is captured as a CUDA graph; there is no GPU here")
