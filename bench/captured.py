"""Where the variant "kinora" comes from: the one place that knows the fast path's entry points.

`runtime.placement.captured` makes a whole denoising block one CUDA graph, in place of `placement.single`.
`graphs.rewrite.wan_vae` makes the VAE's streams such graphs; `FastVae` gives them the interface of `WanVae`.
"""

from typing import Any

import torch
from torch import Tensor

from ..graphs.models.liveavatar import LiveAvatar
from ..graphs.models.wan_vae import DecoderState, EncoderState, WanVae
from ..graphs.rewrite.wan_vae import StreamingDecoder, StreamingEncoder
from ..runtime.placement.captured import CapturedBlock
from ..runtime.systems.liveavatar import Denoiser
from ..runtime.systems.liveavatar_mode import GenerationMode
from .harness.run import Unavailable

LATENTS = 3  # latent frames of a block: what a step of the captured VAE takes


def captured_block(dit: LiveAvatar, prompt: Tensor, mode: GenerationMode, grid: tuple[int, int]) -> Denoiser:
    """As `SingleDevice(dit, prompt, mode, grid)`, captured. Unavailable without a GPU."""
    _need_gpu("CapturedBlock", dit.device)
    return CapturedBlock(dit, prompt, mode, grid)


def fast_vae(vae: WanVae) -> WanVae:
    """The VAE with captured streams. Unavailable without a GPU."""
    _need_gpu("FastVae", next(vae.parameters()).device)
    made: Any = FastVae(vae, StreamingDecoder, StreamingEncoder)
    return made


def _need_gpu(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable(f"{name} is captured as a CUDA graph; there is no GPU here")


class FastVae:
    """A `WanVae` whose `decode_stream` and `encode_stream` replay captured graphs; all else is the VAE's own.

    It serves one stream of each kind at a time: a new state starts it anew. Results are overwritten by the next call.
    """

    def __init__(self, vae: WanVae, make_decoder: Any, make_encoder: Any):
        self._vae, self._make_decoder, self._make_encoder = vae, make_decoder, make_encoder
        self._decoder: Any = None
        self._encoder: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode_stream(self, latents: Tensor, state: DecoderState, *, clamp: bool = True) -> Tensor:
        """As `WanVae.decode_stream`; always clamped."""
        if self._decoder is None:
            self._decoder = self._make_decoder(self._vae, *latents.shape[3:], LATENTS)
            self._decoder.capture()
        self._begin(self._decoder, state)
        pieces = latents.split(LATENTS, 2)
        return self._decoder.step(latents) if len(pieces) == 1 else _joined(self._decoder, pieces)

    def encode_stream(self, video: Tensor, state: EncoderState, *, normalised: bool = True) -> Tensor:
        """As `WanVae.encode_stream` for frames that complete latent frames; always normalised."""
        if self._encoder is None:
            self._encoder = self._make_encoder(self._vae, *video.shape[3:], LATENTS)
            self._encoder.capture()
        self._begin(self._encoder, state)
        return self._encoder.step(video)

    @staticmethod
    def _begin(stream: Any, state: DecoderState | EncoderState) -> None:
        """Start anew when `state` is new, and mark it as used."""
        if not state.slots:
            stream.reset()
            state.slots = [torch.empty(0)]


def _joined(stream: Any, pieces: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([stream.step(piece).clone() for piece in pieces], 2)
