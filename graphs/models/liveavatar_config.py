"""Configuration of LiveAvatar's causal speech-to-video transformer (liveavatar.md, 1.2)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

# Switches of the published file that select code which no released checkpoint uses: they must have these values.
FIXED = {
    "model_type": "s2v",
    "patch_size": [1, 2, 2],
    "qk_norm": True,
    "cross_attn_norm": True,
    "window_size": [-1, -1],
    "zero_timestep": True,
    "enable_motioner": False,
    "enable_tsm": False,
    "trainable_token_pos_emb": False,
    "enable_framepack": True,
    "slide_motion_frames": False,
}
# Without effect: the packer's argument replaces the first, the second belongs to `enable_motioner`.
IGNORED = ("add_last_motion", "motion_token_num")


@dataclass(frozen=True)
class LiveAvatarConfig:
    """Sizes and modes; the defaults are the published 14B model.

    `audio_inject_layers`: after which blocks audio enters. `adain_mode`: "attn_norm" modulates the injector's norm by
    the global audio token, anything else does not. `framepack_drop_mode`: "padd" zeroes unused motion frames, "drop"
    removes their tokens. `local_attn_size`: window in latent frames before the ring wraps, -1 for none.
    `cache_frames`: latent frames that the rolling cache holds. `audio_layers`: hidden states of the audio encoder.
    `rope_dtype`: precision to which rotary tables are rounded (float16 as published; float32 keeps them).
    """

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_dim: int = 16
    out_dim: int = 16
    cond_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    audio_dim: int = 1024
    audio_layers: int = 25
    num_audio_token: int = 4
    audio_inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    enable_adain: bool = True
    adain_mode: str = "attn_norm"
    zero_init: bool = True
    framepack_drop_mode: str = "padd"
    motion_buckets: tuple[int, int, int] = (1, 2, 16)
    local_attn_size: int = -1
    num_frames_per_block: int = 3
    cache_frames: int = 12
    rope_dtype: torch.dtype = torch.float16

    patch = (1, 2, 2)

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must split into {self.num_heads} heads of even size")
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} must be divisible by 4, the audio encoder's first width is dim / 4")
        if self.framepack_drop_mode not in ("padd", "drop"):
            raise ValueError(f"framepack_drop_mode {self.framepack_drop_mode!r} is not known; use 'padd' or 'drop'")
        outside = [i for i in self.audio_inject_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(f"audio_inject_layers {outside} are outside the {self.num_layers} layers")
        if self.cache_frames % self.num_frames_per_block:
            raise ValueError(
                f"cache_frames {self.cache_frames} must be a multiple of the block's {self.num_frames_per_block} frames"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def adain(self) -> bool:
        """Whether the global audio token modulates the injector's norm."""
        return self.enable_adain and self.adain_mode == "attn_norm"

    @classmethod
    def from_published(cls, config: Mapping[str, Any], **overrides: Any) -> "LiveAvatarConfig":
        """From the keys of a published `config.json`; ValueError for an unpublished variant or an unknown key."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in config.items():
            value = list(value) if isinstance(value, tuple) else value
            if key in FIXED:
                if value != FIXED[key]:
                    raise ValueError(
                        f"config key {key}={value!r} is not supported; published models have {FIXED[key]!r}"
                    )
            elif key in known:
                values[key] = tuple(value) if isinstance(value, list) else value
            elif not key.startswith("_") and key not in IGNORED:
                raise ValueError(f"config key {key!r} is not known to LiveAvatar; is this another model's config.json?")
        return cls(**{**values, **overrides})


LIVEAVATAR_14B = LiveAvatarConfig()
