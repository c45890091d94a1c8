"""Where the variant "kinora" comes from: the one place that knows the fast path's entry points.

`graphs.capture` makes a whole denoising block one CUDA graph; what it returns takes the place of
`runtime.placement.single.SingleDevice` (`condition`, `denoise`). The fast VAE takes the place of `WanVae` in its streams
(`decode_stream`, `encode_stream`).
"""

from importlib import import_module

from torch import Tensor

from ..graphs.models.liveavatar import LiveAvatar
from ..graphs.models.wan_vae import WanVae
from ..runtime.systems.liveavatar import Denoiser
from ..runtime.systems.liveavatar_mode import GenerationMode
from .harness.run import Unavailable


def captured_block(dit: LiveAvatar, prompt: Tensor, mode: GenerationMode, grid: tuple[int, int]) -> Denoiser:
    """As `SingleDevice(dit, prompt, mode, grid)`, captured.

    Unavailable when this build has no capture, or the device cannot capture.
    """
    try:
        make = import_module("..graphs.capture", __package__).CapturedBlock
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"this build has no captured block ({error})") from error
    if dit.device.type != "cuda":
        raise Unavailable("a block is captured as a CUDA graph; there is no GPU here")
    made: Denoiser = make(dit, prompt, mode, grid)
    return made


def fast_vae(vae: WanVae) -> WanVae:
    """The VAE on its fast path. Unavailable when this build has none, or there is no GPU."""
    try:
        make = import_module("..graphs.models.wan_vae_fused", __package__).FusedVae
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"this build has no fast VAE ({error})") from error
    if not next(vae.parameters()).is_cuda:
        raise Unavailable("the fast VAE runs on a GPU; there is none here")
    made: WanVae = make(vae)
    return made
