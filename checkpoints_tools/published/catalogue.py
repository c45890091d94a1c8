"""Every checkpoint that the five systems publish or stand on: what it is, where it comes from, and its tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from . import encoders, latentsync, wan
from .rows import Layer, Shapes, expand

Alias = tuple[str, str]

# Names under which some files carry the same tensors: (regular expression, what it becomes).
WEIGHT_NORM: tuple[Alias, ...] = (
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
HF_WAV2VEC2: tuple[Alias, ...] = ((r"^wav2vec2\.", ""), *WEIGHT_NORM)
WRAPPED: tuple[Alias, ...] = ((r"^(module|model\.diffusion_model|diffusion_model|pipe\.dit|model)\.", ""),)
OLD_ATTENTION: tuple[Alias, ...] = (
    (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)
PEFT: tuple[Alias, ...] = (
    (r"^base_model\.model\.", ""),
    (r"\.lora_([AB])\.weight$", r".lora_\1.default.weight"),
)
TIED: tuple[Alias, ...] = ((r"^encoder\.embed_tokens\.weight$", "shared.weight"),)


@dataclass(frozen=True)
class Published:
    """One file, or set of shards. `where`: repository and path; `precision`: as it is published.

    `table` makes the names and shapes; `aliases` turn other names of a tensor into the table's; `unread` (a regular
    expression) are further names that the file may have and no system reads; `optional` names that it may lack.
    """

    name: str
    part: str
    where: str
    precision: str
    table: Callable[[], Mapping[str, Layer] | Shapes]
    aliases: tuple[Alias, ...] = ()
    unread: str = ""
    optional: tuple[str, ...] = ()

    @cached_property
    def shapes(self) -> Shapes:
        """Name -> shape of every tensor that is read."""
        found: Shapes = {}
        for name, value in self.table().items():
            if isinstance(value, dict):
                found |= expand({name: value})
            else:
                found[name] = value
        return found

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        total = 0
        for shape in self.shapes.values():
            count = 1
            for side in shape:
                count *= side
            total += count
        return total

    def canonical(self, name: str) -> str | None:
        """The table's name for a name in a file; None for one that no system reads."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return None if self.unread and re.match(self.unread, name) else name


def _transformer(name: str, where: str, size: wan.Size, precision: str = "float32") -> tuple[Published, Published]:
    """A Wan transformer in its own layout and in diffusers'."""
    own = Published(name, "transformer", where, precision, lambda: wan.transformer(size), WRAPPED)
    other = replace(
        own,
        name=f"{name} in diffusers",
        where=f"{where.partition(' ')[0]}-Diffusers transformer/",
        table=lambda: wan.in_diffusers(wan.transformer(size)),
        unread=r".*\.norm_added_q\.",
    )
    return own, other


T2V_SMALL, T2V_LARGE = "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"
DIT, SHARDS = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors"
S2V, LIVEAVATAR = "Wan2.2-S2V-14B", "LiveAvatar LoRA"
OMNI_LARGE, OMNI_SMALL, STABLE = "OmniAvatar-14B", "OmniAvatar-1.3B", "StableAvatar-1.3B"
SKY_AVATAR, UNET = "SkyReels-V3-A2V-19B", "LatentSync U-Net"
VAE, TEXT, CLIP, WHISPER = "Wan2.1 VAE", "UMT5-XXL encoder", "CLIP XLM-R ViT-H/14", "Whisper tiny"
SPEECH_BASE, SPEECH_LARGE, SD_VAE = "wav2vec2-base", "wav2vec2-large-xlsr-53", "sd-vae-ft-mse"

CATALOGUE: tuple[Published, ...] = (
    Published(S2V, "transformer", f"Wan-AI/Wan2.2-S2V-14B {SHARDS}", "bfloat16", wan.speech_to_video, WRAPPED),
    Published(
        LIVEAVATAR, "LoRA", "Quark-Vision/Live-Avatar liveavatar.safetensors", "bfloat16", wan.liveavatar_lora, PEFT
    ),
    *_transformer(T2V_SMALL, f"Wan-AI/Wan2.1-T2V-1.3B {DIT}", wan.SMALL),
    *_transformer(T2V_LARGE, f"Wan-AI/Wan2.1-T2V-14B {SHARDS}", wan.LARGE),
    *_transformer("Wan2.1-I2V-14B", f"Wan-AI/Wan2.1-I2V-14B-480P {SHARDS}", wan.IMAGE_LARGE),
    *_transformer(
        "Wan2.2-I2V-A14B", f"Wan-AI/Wan2.2-I2V-A14B high_noise_model/{SHARDS}", replace(wan.LARGE, channels=36)
    ),
    Published(
        OMNI_LARGE,
        "LoRA and audio modules",
        "OmniAvatar/OmniAvatar-14B pytorch_model.pt",
        "bfloat16",
        lambda: wan.omniavatar_lora(wan.LARGE),
        PEFT,
    ),
    Published(
        OMNI_SMALL,
        "LoRA and audio modules",
        "OmniAvatar/OmniAvatar-1.3B pytorch_model.pt",
        "bfloat16",
        lambda: wan.omniavatar_lora(wan.SMALL),
        PEFT,
    ),
    *(
        Published(
            f"{name}, whole, {channels} channels",
            "transformer",
            "trained here, or OmniAvatar with train_architecture full",
            "bfloat16",
            lambda size=size, channels=channels: wan.omniavatar(size, channels),  # type: ignore[misc]
            WRAPPED,
        )
        for name, size in ((OMNI_LARGE, wan.LARGE), (OMNI_SMALL, wan.SMALL))
        for channels in (33, 49)
    ),
    Published(
        STABLE,
        "transformer",
        "FrancisRing/StableAvatar StableAvatar-1.3B/transformer3d-*.pt",
        "bfloat16",
        wan.stableavatar,
        WRAPPED,
    ),
    Published(
        "Wan2.1-Fun-V1.1-1.3B-InP",
        "transformer",
        f"alibaba-pai/Wan2.1-Fun-V1.1-1.3B-InP {DIT}",
        "bfloat16",
        lambda: wan.transformer(wan.IMAGE_SMALL),
        WRAPPED,
    ),
    Published(
        SKY_AVATAR, "transformer", "Skywork/SkyReels-V3-A2V-19B *.safetensors", "bfloat16", wan.skyreels_avatar, WRAPPED
    ),
    Published(VAE, "VAE", "Wan-AI/Wan2.1-T2V-14B Wan2.1_VAE.pth", "float32", encoders.wan_vae, WRAPPED),
    Published(
        f"{VAE} in diffusers", "VAE", "Wan-AI/Wan2.1-T2V-14B-Diffusers vae/", "float32", encoders.wan_vae_in_diffusers
    ),
    Published(TEXT, "text encoder", "Wan-AI/Wan2.1-T2V-14B models_t5_umt5-xxl-enc-bf16.pth", "bfloat16", encoders.umt5),
    Published(
        f"{TEXT} in transformers",
        "text encoder",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers text_encoder/",
        "float32",
        encoders.umt5_in_transformers,
        TIED,
    ),
    Published(
        CLIP,
        "image encoder",
        "Wan-AI/Wan2.1-I2V-14B-480P models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "float32",
        encoders.clip,
    ),
    Published(
        SPEECH_BASE,
        "speech encoder",
        "facebook/wav2vec2-base-960h or TencentGameMate/chinese-wav2vec2-base",
        "float32",
        lambda: encoders.wav2vec2(large=False),
        HF_WAV2VEC2,
        r"lm_head\.|quantizer\.|project_(q|hid)\.",
        ("masked_spec_embed",),
    ),
    Published(
        SPEECH_LARGE,
        "speech encoder",
        "jonatasgrosman/wav2vec2-large-xlsr-53-english",
        "float32",
        lambda: encoders.wav2vec2(large=True),
        HF_WAV2VEC2,
        r"lm_head\.|quantizer\.|project_(q|hid)\.",
        ("masked_spec_embed",),
    ),
    Published(
        WHISPER,
        "speech encoder",
        "ByteDance/LatentSync-1.6 whisper/tiny.pt",
        "float16",
        encoders.whisper,
        (),
        r"decoder\.",
    ),
    Published(UNET, "U-Net", "ByteDance/LatentSync-1.6 latentsync_unet.pt", "float32", latentsync.unet, WRAPPED),
    Published(
        f"{UNET}, first stage",
        "U-Net",
        "trained with stage1.yaml",
        "float32",
        lambda: latentsync.unet(motion=False),
        WRAPPED,
    ),
    Published(
        "StableSyncNet",
        "lip-sync supervisor",
        "ByteDance/LatentSync-1.6 stable_syncnet.pt",
        "float32",
        latentsync.stable_syncnet,
        WRAPPED,
    ),
    Published(
        "SyncNet v2",
        "lip-sync score",
        "ByteDance/LatentSync-1.5 auxiliary/syncnet_v2.model",
        "float32",
        latentsync.syncnet_v2,
        (),
        "",
        tuple(name for name in expand(latentsync.syncnet_v2()) if name.endswith("num_batches_tracked")),
    ),
    Published(SD_VAE, "VAE", "stabilityai/sd-vae-ft-mse", "float32", latentsync.sd_vae, OLD_ATTENTION),
)

SYSTEMS: dict[str, tuple[str, ...]] = {
    "LiveAvatar": (S2V, LIVEAVATAR, TEXT, VAE, SPEECH_LARGE),
    "OmniAvatar 14B": (OMNI_LARGE, T2V_LARGE, TEXT, VAE, SPEECH_BASE),
    "OmniAvatar 1.3B": (OMNI_SMALL, T2V_SMALL, TEXT, VAE, SPEECH_BASE),
    "StableAvatar 1.3B": (STABLE, TEXT, CLIP, VAE, SPEECH_BASE),
    "SkyReels V3 talking avatar": (SKY_AVATAR, TEXT, CLIP, VAE, SPEECH_BASE),
    "LatentSync": (UNET, WHISPER, SD_VAE),
}
"""What each system needs, the part that is its own first."""

ALSO: dict[str, str] = {
    T2V_LARGE: "also SkyReels V3 video extension (both transformers) and each expert of Wan2.2-T2V-A14B",
    f"{T2V_LARGE} in diffusers": "also SkyReels V3 reference to video",
    "Wan2.1-Fun-V1.1-1.3B-InP": "the base of StableAvatar",
}
"""Checkpoints with the same tensors."""
