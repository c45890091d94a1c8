"""Frame packer: 19 past latent frames become few tokens, the older the coarser (liveavatar.md, 2.7)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import PatchConv
from .liveavatar_rope import Segment

KERNELS = ((1, 2, 2), (2, 4, 4), (4, 8, 8))  # newest to oldest group


class FramePacker(nn.Module):
    """Three patch convolutions over the newest 1, the 2 before and the 16 before those (`buckets`)."""

    def __init__(self, in_dim: int, dim: int, drop_mode: str = "padd", buckets: tuple[int, int, int] = (1, 2, 16)):
        super().__init__()
        self.proj = PatchConv(in_dim, dim, KERNELS[0])
        self.proj_2x = PatchConv(in_dim, dim, KERNELS[1])
        self.proj_4x = PatchConv(in_dim, dim, KERNELS[2])
        self.drop_mode = drop_mode
        self.buckets = buckets

    def _groups(self, add_last_motion: int) -> range:
        """Indices of the groups that give tokens: all of them, or in mode "drop" the ones that are used."""
        if add_last_motion not in (0, 1, 2):
            raise ValueError(f"add_last_motion is {add_last_motion}; use 2 (all motion frames), 1 or 0")
        return range(2 - add_last_motion if self.drop_mode == "drop" else 0, len(self.buckets))

    def segments(self, height: int, width: int, add_last_motion: int = 2) -> list[Segment]:
        """Rotary segments of the tokens for latents of `height` x `width`, in token order (newest first)."""
        rows, columns = height // 2, width // 2
        found = []
        for i in self._groups(add_last_motion):
            frames, (kt, kh, kw) = self.buckets[i], KERNELS[i]
            start = (-sum(self.buckets[: i + 1]), 0, 0)
            found.append(Segment(start, (frames // kt, height // kh, width // kw), (frames, rows, columns)))
        return found

    def forward(self, latents: Tensor, add_last_motion: int = 2) -> Tensor:
        """Motion latents [B, C, T, h, w] (any T; the last 19 count, missing ones are zero) -> tokens [B, M, D]."""
        total = sum(self.buckets)
        latents = latents[:, :, -total:]
        latents = F.pad(latents, (0, 0, 0, 0, total - latents.shape[2], 0))
        groups = self._groups(add_last_motion)
        unused = sum(self.buckets[: 2 - add_last_motion])
        if self.drop_mode == "padd" and unused:
            latents = torch.cat((latents[:, :, :-unused], torch.zeros_like(latents[:, :, -unused:])), 2)
        newest_first = latents.split(self.buckets[::-1], dim=2)[::-1]
        convs = (self.proj, self.proj_2x, self.proj_4x)
        segments = self.segments(latents.shape[-2], latents.shape[-1], add_last_motion)
        tokens = [
            convs[i](newest_first[i]).flatten(2).transpose(1, 2)
            for i, segment in zip(groups, segments, strict=True)
            if segment.tokens
        ]
        return torch.cat(tokens, 1)
