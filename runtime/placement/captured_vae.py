"""The VAE of a stream as captured graphs: `WanVae`'s interface over `graphs.rewrite.wan_vae`.

A decoder belongs to one session, which it serves all the time; an encoder is needed for whole videos now and then (the
picture at the opening), so sessions share it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...graphs.capture import Pool
from ...graphs.models.wan_vae import DecoderState, EncoderState, VaeConfig, WanVae
from ...graphs.rewrite.wan_vae import StreamingDecoder, StreamingEncoder

DECODED = 3  # latent frames a step: a block
ENCODED = 1  # a third of the memory of 3, and the encoder is not in a hurry


class CapturedDecoder:
    """`WanVae.decode` and `decode_stream` for latents of one size; one stream at a time: a new state starts it anew.

    `grid`: latent (rows, columns); a step takes `latents` latent frames; `pool`: memory shared with other graphs.
    Frames are clamped to [-1, 1].
    """

    def __init__(self, vae: WanVae, grid: tuple[int, int], latents: int = DECODED, pool: Pool | None = None):
        self.latents = latents
        self.stream = StreamingDecoder(vae, *grid, latents)
        self.state: DecoderState | None = None
        if self.stream.latents.is_cuda:
            self.stream.capture(pool)

    def decode_stream(self, latents: Tensor, state: DecoderState) -> Tensor:
        """The next latent frames [1, z, F, h, w] of a stream -> their frames [1, 3, t, H, W], float32.

        Errors: ValueError for the state of a stream that another one has replaced.
        """
        if state is not self.state:
            _check_new(state)
            self.stream.reset()
            self.state = state
        return torch.cat([self.stream.step(piece).clone() for piece in latents.split(self.latents, 2)], 2)

    def decode(self, latents: Tensor) -> Tensor:
        """A whole clip [1, z, F, h, w] -> [1, 3, 1 + 4 (F - 1), H, W], float32."""
        return self.decode_stream(latents, DecoderState())


class CapturedEncoder:
    """`WanVae.encode` and `encode_stream` for frames of one size, as `CapturedDecoder`. Latents are normalised."""

    def __init__(self, vae: WanVae, size: tuple[int, int], latents: int = ENCODED, pool: Pool | None = None):
        """`size`: (height, width) in pixels."""
        self.factor = vae.config.temporal_factor
        self.latents = latents
        self.stream = StreamingEncoder(vae, *size, latents)
        self.state: EncoderState | None = None
        if self.stream.video.is_cuda:
            self.stream.capture(pool)

    def encode_stream(self, video: Tensor, state: EncoderState) -> Tensor:
        """The next frames [1, 3, T, H, W] of a stream, 1 + 4 m first and 4 m afterwards -> latents, float32."""
        opening = state is not self.state
        if opening:
            _check_new(state)
            self.stream.reset()
            self.state = state
        step = self.latents * self.factor
        first = min(1 + step - self.factor, video.shape[2]) if opening else 0  # the first latent frame takes one frame
        pieces = ([video[:, :, :first]] if opening else []) + list(video[:, :, first:].split(step, 2))
        made = [self.stream.step(piece).clone() for piece in pieces if piece.shape[2]]
        return torch.cat(made, 2)

    def encode(self, video: Tensor) -> Tensor:
        """A whole clip [1, 3, 1 + 4 m, H, W] in [-1, 1] -> latents [1, z, 1 + m, h, w]; a rest below 4 is dropped."""
        usable = 1 + (video.shape[2] - 1) // self.factor * self.factor
        return self.encode_stream(video[:, :, :usable], EncoderState())


def _check_new(state: DecoderState | EncoderState) -> None:
    """A state serves one stream, and is marked with it."""
    if state.slots:
        raise ValueError("another stream has begun since this state was used; a captured stream cannot go back to it")
    state.slots = [torch.empty(0)]


class CapturedVae:
    """What a stream needs of a `WanVae` (`systems.codec.VideoCodec`), over captured graphs of one video size."""

    def __init__(self, config: VaeConfig, decoder: CapturedDecoder, encode: Callable[[Tensor], Tensor]):
        """`encode`: `CapturedEncoder.encode`, or what borrows one for the call."""
        self.config = config
        self.decoder = decoder
        self.encode = encode

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder.decode(latents)

    def decode_stream(self, latents: Tensor, state: DecoderState) -> Tensor:
        return self.decoder.decode_stream(latents, state)
