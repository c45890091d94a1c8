"""What a system needs of a video VAE: `graphs.models.wan_vae.WanVae`, or its captured form in `placement`."""

from typing import Protocol

from torch import Tensor

from ...graphs.models.wan_vae import DecoderState, VaeConfig


class StreamCodec(Protocol):
    """What decodes a stream of latents [B, z, F, H / 8, W / 8]."""

    def decode_stream(self, latents: Tensor, state: DecoderState, /) -> Tensor:
        """The next latents of a stream -> their frames [B, 3, T, H, W] in [-1, 1]; advances `state`."""
        ...


class VideoCodec(StreamCodec, Protocol):
    """And videos [B, 3, T, H, W] in [-1, 1] as a whole; latents are normalised."""

    config: VaeConfig

    def encode(self, video: Tensor, /) -> Tensor:
        """Frames 1 + 4 m -> latents 1 + m, float32."""
        ...

    def decode(self, latents: Tensor, /) -> Tensor:
        """Latents 1 + m -> frames 1 + 4 m, float32."""
        ...
