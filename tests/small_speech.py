"""Sizes of a wav2vec 2.0 of two layers."""

from kinora.runtime.encoders.wav2vec import Wav2Vec2Size

TINY_SPEECH = Wav2Vec2Size(
    dim=16,
    heads=2,
    layers=2,
    ffn=24,
    stable=True,
    conv_channels=(8,) * 7,
    conv_bias=True,
    conv_norm="layer",
    position_kernel=8,
    position_groups=2,
)
