"""CLIP image rows for the DiT: open-clip XLM-R ViT-H/14's visual part, through `transformers` (wan.md 2.4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ...checkpoints_tools.assign import assign_state
from ...checkpoints_tools.keymaps import CLIP, KeyMap
from ...checkpoints_tools.load import load_module
from .half_precision import rounded_once
from .loading import open_checkpoint

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipSize:
    """Sizes of the published tower; `blocks` of its `layers` are run (all but the last)."""

    dim: int
    heads: int
    layers: int
    ffn: int
    image_size: int = 224
    patch: int = 14
    eps: float = 1e-5

    @property
    def blocks(self) -> int:
        """Blocks whose output the DiT reads: the penultimate one's."""
        return self.layers - 1

    @property
    def tokens(self) -> int:
        """Class token and patches."""
        return (self.image_size // self.patch) ** 2 + 1

    def to_transformers(self, blocks: int | None = None) -> CLIPVisionConfig:
        """The same sizes as a transformers configuration, with the first `blocks` blocks (None: all)."""
        return CLIPVisionConfig(
            hidden_size=self.dim,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers if blocks is None else blocks,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch,
            hidden_act="gelu",
            layer_norm_eps=self.eps,
        )


CLIP_VIT_H_14 = ClipSize(dim=1280, heads=16, layers=32, ffn=5120)


def clip_pixels(videos: Sequence[Tensor], image_size: int = 224) -> Tensor:
    """Videos [3, f, H, W] in [-1, 1] -> normalised pictures [sum f, 3, S, S], float32.

    Bicubic to a square without antialias (the aspect ratio is not kept), then (x / 2 + 1 / 2 - mean) / std.
    """
    for video in videos:
        if video.ndim != 4 or video.shape[0] != 3:
            raise ValueError(f"expected pictures [3, f, H, W] in [-1, 1], got {list(video.shape)}")
    size = (image_size, image_size)
    frames = [video.transpose(0, 1).float() for video in videos]  # [f, 3, H, W]
    square = torch.cat([F.interpolate(x, size, mode="bicubic", align_corners=False) for x in frames])
    mean, std = (square.new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (square * 0.5 + 0.5 - mean) / std


class ClipVision(nn.Module):
    """The first blocks of the tower: pictures -> hidden states, no final norm, no projection; eval, no gradients."""

    def __init__(self, size: ClipSize = CLIP_VIT_H_14, blocks: int | None = None):
        """`blocks` None runs all but the last, which is what every system reads."""
        super().__init__()
        self.size = size
        self.blocks = size.blocks if blocks is None else blocks
        if not 1 <= self.blocks <= size.layers:
            raise ValueError(f"blocks must lie in 1..{size.layers}, got {self.blocks}")
        model = CLIPVisionModel(size.to_transformers(self.blocks)).eval().requires_grad_(False)
        self.vision_model = getattr(model, "vision_model", model)  # older transformers wrap the tower once more
        self.vision_model.post_layernorm = nn.Identity()  # feeds the pooled output alone, which nobody reads

    def assign(
        self, state: dict[str, Tensor], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """Take the weights from a state dict with published names (`visual.*`; the text tower is not read)."""
        assign_state(self, state, self._keymap(), dtype=dtype, device=device)
        self._number_positions()

    def _keymap(self) -> KeyMap:
        """The published names, less those of blocks that are not run."""
        beyond = tuple(f"visual.transformer.{j}." for j in range(self.blocks, self.size.layers))
        return replace(CLIP, unused=(*CLIP.unused, "visual.post_norm.", *beyond))

    def _number_positions(self) -> None:
        """The buffer that no file holds."""
        embeddings = self.vision_model.embeddings
        embeddings.position_ids = torch.arange(self.size.tokens, device=embeddings.class_embedding.device)[None]

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        size: ClipSize = CLIP_VIT_H_14,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ) -> "ClipVision":
        """From `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`; raises CheckpointError."""
        with torch.device("meta"):
            tower = cls(size)
        with open_checkpoint(checkpoint) as weights:
            load_module(tower, weights, tower._keymap(), dtype=dtype, device=device)
        tower._number_positions()
        return tower

    @torch.no_grad()
    def forward(self, videos: Sequence[Tensor]) -> Tensor:
        """Videos [3, f, H, W] in [-1, 1] -> [sum f, tokens, D] in the dtype of the weights; frames in order."""
        pixels = clip_pixels(videos, self.size.image_size)
        with rounded_once():
            return self.vision_model(pixel_values=pixels).last_hidden_state
