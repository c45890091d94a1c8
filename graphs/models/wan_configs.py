"""Sizes and precision flows of the Wan DiT family as data (wan.md, 1.2 and 2.3.5)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

CLIP_WIDTH = 1280


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one Wan DiT; the defaults are the values that every published model shares.

    `image_dim` is the width of the CLIP features of Wan 2.1 image-to-video and None where the model has no image
    cross-attention (text-to-video, and all of Wan 2.2, whose image-to-video only widens `in_dim`).
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} does not split into {self.num_heads} heads of an even size")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} is odd; the time sinusoid needs pairs")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_published(cls, values: Mapping[str, Any], image_dim: int | None = None) -> "WanConfig":
        """Read a published `config.json`; it does not say whether image cross-attention exists, so `image_dim` does.

        Raises ValueError for the variants that were never published and are not built here.
        """
        for name, built in (("qk_norm", True), ("cross_attn_norm", True), ("window_size", (-1, -1))):
            given = values.get(name, built)
            if (tuple(given) if isinstance(given, list) else given) != built:
                raise ValueError(f"{name} = {given} is not supported; every published Wan model has {built}")
        known = {field.name for field in fields(cls)} - {"image_dim"}
        sizes: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known
        }
        return cls(**sizes, image_dim=image_dim)


WAN21_T2V_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN21_T2V_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN21_I2V_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, image_dim=CLIP_WIDTH)
WAN22_T2V_A14B = WAN21_T2V_14B
WAN22_I2V_A14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36)


@dataclass(frozen=True)
class Precision:
    """Where a flow rounds: dtype of the stored weights, of the products, and whether float32 islands exist.

    The islands are the time embedding and projection, the rotary output and the head's Linear. Everything else
    follows from torch's type promotion, because each op keeps or promotes its inputs' dtypes as upstream does.
    """

    weights: torch.dtype = torch.float32
    products: torch.dtype = torch.float32
    islands: bool = False


FLOAT32 = Precision()
WAN21_BF16_MODULE = Precision(torch.bfloat16, torch.bfloat16)
WAN21_BF16_AUTOCAST = Precision(torch.float32, torch.bfloat16)
WAN22_BF16_AUTOCAST = Precision(torch.float32, torch.bfloat16, islands=True)
WAN22_BF16_CONVERTED = Precision(torch.bfloat16, torch.bfloat16, islands=True)
