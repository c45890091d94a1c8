"""Latents of blocks -> frames, with either context of the released pipelines (liveavatar.md, 3.5 and 3.7).

Both decoders take one block at a time and drop the first frames of the video. Frames are [3, n, H, W] in [-1, 1].
"""

import torch
from torch import Tensor

from ...graphs.models.wan_vae import DecoderState
from .codec import StreamCodec, VideoCodec
from .liveavatar_conditions import still_video
from .liveavatar_mode import GenerationMode


class StreamDecoder:
    """Decodes with caches that live as long as the video, warmed by the start of the motion latents."""

    def __init__(self, vae: StreamCodec, motion: Tensor, mode: GenerationMode):
        self.vae = vae
        self.state = DecoderState()
        vae.decode_stream(motion[:, :, : mode.warm_latents], self.state)
        self.to_drop = mode.drop_first_frames

    def push(self, latents: Tensor) -> Tensor:
        """Frames of a block: a whole block's, fewer in the first call."""
        frames = self.vae.decode_stream(latents, self.state)[0, :, self.to_drop :]
        self.to_drop = 0
        return frames


class ClipDecoder:
    """Decodes whole clips after the encoding of a sliding window of the frames before them.

    `context` [1, 16, T, h, w] is that encoding: at first the still picture's, then that of its last
    `mode.motion_frames` pixel frames after at most `mode.slide_frames` of each clip have been slid in.
    """

    def __init__(self, vae: VideoCodec, pixels: Tensor, motion: Tensor, mode: GenerationMode):
        self.vae = vae
        self.mode = mode
        self.window = still_video(pixels, mode.motion_frames)
        self.context = motion
        self.blocks: list[Tensor] = []
        self.to_drop = mode.drop_first_frames

    def push(self, latents: Tensor) -> Tensor:
        """Frames of a clip when this was its last block, otherwise none."""
        self.blocks.append(latents)
        if len(self.blocks) < self.mode.clip_blocks:
            return self.window.new_zeros(3, 0, *self.window.shape[3:])
        video = self.vae.decode(torch.cat((self.context, *self.blocks), 2))
        frames = video[:, :, -self.mode.clip_frames :][:, :, self.to_drop :]
        self.to_drop, self.blocks = 0, []
        slid = min(self.mode.slide_frames, self.mode.motion_frames, frames.shape[2])
        self.window = torch.cat((self.window[:, :, slid:], frames[:, :, -slid:].to(self.window)), 2)
        self.context = self.vae.encode(self.window)
        return frames[0]
