"""Tables of the transformers of the Wan family (wan.md 1.3; liveavatar.md 1.3; omniavatar.md, stableavatar.md,
skyreels_v3.md: their sections 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..keymaps import KeyMap
from ..keymaps_dit import WAN_DIFFUSERS
from .rows import Layer, Shapes, conv, expand, linear, norm, scale, tensor

TEXT, FREQUENCIES, CLIP = 4096, 256, 1280
PATCH = (1, 2, 2)


@dataclass(frozen=True)
class Size:
    """Width, feed-forward width, blocks and input channels; `images`: cross-attention to CLIP's image rows."""

    dim: int
    ffn: int
    layers: int
    channels: int = 16
    images: bool = False

    @property
    def block(self) -> str:
        return f"blocks.<0-{self.layers - 1}>"


SMALL = Size(1536, 8960, 30)
LARGE = Size(5120, 13824, 40)
IMAGE_SMALL = replace(SMALL, channels=36, images=True)
IMAGE_LARGE = replace(LARGE, channels=36, images=True)


def transformer(size: Size) -> dict[str, Layer]:
    """`WanModel` (wan.md, 1.3)."""
    d, block = size.dim, size.block
    table = {
        "patch_embedding": conv(d, size.channels, *PATCH),
        "text_embedding.0": linear(d, TEXT),
        "text_embedding.2": linear(d, d),
        "time_embedding.0": linear(d, FREQUENCIES),
        "time_embedding.2": linear(d, d),
        "time_projection.1": linear(6 * d, d),
        f"{block}.modulation": tensor(1, 6, d),
        f"{block}.<self,cross>_attn.<q,k,v,o>": linear(d, d),
        f"{block}.<self,cross>_attn.norm_<q,k>": scale(d),
        f"{block}.norm3": norm(d),
        f"{block}.ffn.0": linear(size.ffn, d),
        f"{block}.ffn.2": linear(d, size.ffn),
        "head.modulation": tensor(1, 2, d),
        "head.head": linear(64, d),
    }
    if size.images:
        table |= {
            f"{block}.cross_attn.<k,v>_img": linear(d, d),
            f"{block}.cross_attn.norm_k_img": scale(d),
            "img_emb.proj.0": norm(CLIP),
            "img_emb.proj.1": linear(CLIP, CLIP),
            "img_emb.proj.3": linear(d, CLIP),
            "img_emb.proj.4": norm(d),
        }
    return table


def speech_to_video(size: Size = LARGE, injections: int = 12, states: int = 25, speech: int = 1024) -> dict[str, Layer]:
    """Wan2.2-S2V, LiveAvatar's base: `injections` audio layers, `states` of a speech encoder of width `speech`."""
    d, encoder, injector = size.dim, "casual_audio_encoder", f"audio_injector.injector.<0-{injections - 1}>"
    return transformer(size) | {
        "cond_encoder": conv(d, 16, *PATCH),
        "trainable_cond_mask": scale_rows(3, d),
        f"{encoder}.weights": tensor(1, states, 1, 1),
        f"{encoder}.encoder.padding_tokens": tensor(1, 1, 1, d),
        f"{encoder}.encoder.conv1_local.conv": conv(d, speech, 3),
        f"{encoder}.encoder.conv1_global.conv": conv(d // 4, speech, 3),
        f"{encoder}.encoder.conv2.conv": conv(d // 2, d // 4, 3),
        f"{encoder}.encoder.conv3.conv": conv(d, d // 2, 3),
        f"{encoder}.encoder.final_linear": linear(d, d),
        f"{injector}.<q,k,v,o>": linear(d, d),
        f"{injector}.norm_<q,k>": scale(d),
        f"audio_injector.injector_adain_layers.<0-{injections - 1}>.linear": linear(2 * d, d),
        "frame_packer.proj": conv(d, 16, 1, 2, 2),
        "frame_packer.proj_2x": conv(d, 16, 2, 4, 4),
        "frame_packer.proj_4x": conv(d, 16, 4, 8, 8),
    }


def scale_rows(rows: int, width: int) -> Layer:
    """The table of an embedding."""
    return {".weight": (rows, width)}


def omniavatar(size: Size, channels: int = 33) -> dict[str, Layer]:
    """The whole OmniAvatar transformer; `channels` 33 as published, 49 for lip-sync (omniavatar.md, 2.2)."""
    return transformer(replace(size, channels=channels)) | _omniavatar_audio(size)


def omniavatar_lora(size: Size, rank: int = 128, channels: int = 33) -> dict[str, Layer]:
    """What `pytorch_model.pt` holds: adapters, audio modules and the patch embedding (omniavatar.md, 1.3)."""
    table = lora(size, rank, default=True) | _omniavatar_audio(size)
    return table | {"patch_embedding": conv(size.dim, channels, *PATCH)}


def _omniavatar_audio(size: Size) -> dict[str, Layer]:
    projections = size.layers // 2 - 1  # before blocks 2 to layers / 2
    return {
        "audio_proj.proj": linear(32, 4 * 14 * 768),  # 4 frames of 14 hidden states
        "audio_proj.norm_out": norm(32),
        f"audio_cond_projs.<0-{projections - 1}>": linear(size.dim, 32),
    }


def lora(size: Size, rank: int = 128, default: bool = False) -> dict[str, Layer]:
    """Adapters of the attention and feed-forward layers of every block, in PEFT's names."""
    d, end = size.dim, ".default.weight" if default else ".weight"

    def pair(outputs: int, inputs: int) -> Layer:
        return {f".lora_A{end}": (rank, inputs), f".lora_B{end}": (outputs, rank)}

    return {
        f"{size.block}.<self,cross>_attn.<q,k,v,o>": pair(d, d),
        f"{size.block}.ffn.0": pair(size.ffn, d),
        f"{size.block}.ffn.2": pair(d, size.ffn),
    }


def liveavatar_lora(rank: int = 128, injections: int = 12) -> dict[str, Layer]:
    """`liveavatar.safetensors`: the blocks and the audio injector (liveavatar.md, 1.4)."""
    pair: Layer = {".lora_A.default.weight": (rank, LARGE.dim), ".lora_B.default.weight": (LARGE.dim, rank)}
    return lora(LARGE, rank, default=True) | {f"audio_injector.injector.<0-{injections - 1}>.<q,k,v,o>": pair}


def stableavatar(size: Size = IMAGE_SMALL, speech: int = 768) -> dict[str, Layer]:
    """StableAvatar on Wan2.1-Fun-V1.1-1.3B-InP (stableavatar.md, 1.2)."""
    d, adapter = size.dim, "vocal_projector.blocks.<0-1>"
    return transformer(size) | {
        f"{size.block}.cross_attn.<k,v>_vocal": linear(d, d),
        "vocal_projector.proj_model.proj": linear(d, speech, bias=False),
        "vocal_projector.proj_model.norm": norm(d),
        f"{adapter}.modulation": tensor(1, 6, d),
        f"{adapter}.norm3": norm(d),
        f"{adapter}.cross_attn.<q,k,v,o>": linear(d, d),
        f"{adapter}.cross_attn.norm_<q,k>": scale(d),
        f"{adapter}.ffn.0": linear(2 * d, d),
        f"{adapter}.ffn.2": linear(d, 2 * d),
        "vocal_projector.final_head.modulation": tensor(1, 2, d),
        "vocal_projector.final_head.final_proj": linear(d, d),
    }


def skyreels_avatar(size: Size = IMAGE_LARGE) -> dict[str, Layer]:
    """SkyReels V3 talking avatar 19B (skyreels_v3.md, 1.3)."""
    d, speech, hidden, tokens = size.dim, 768, 512, 32
    window, latent_window, states = 5, 8, 12
    return transformer(size) | {
        f"{size.block}.norm_x": norm(d),
        f"{size.block}.audio_cross_attn.<q_linear,proj>": linear(d, d),
        f"{size.block}.audio_cross_attn.kv_linear": linear(2 * d, speech),
        "audio_proj.proj1": linear(hidden, window * states * speech),
        "audio_proj.proj1_vf": linear(hidden, latent_window * states * speech),
        "audio_proj.proj2": linear(hidden, hidden),
        "audio_proj.proj3": linear(tokens * speech, hidden),
        "audio_proj.norm": norm(speech),
    }


def in_diffusers(table: Mapping[str, Layer], keymap: KeyMap = WAN_DIFFUSERS) -> Shapes:
    """A table in the names of another library; KeyError for a tensor that its key table does not know."""
    found = {}
    for name, shape in expand(table).items():
        renamed = keymap.rename(name)
        if len(renamed) != 1:
            raise KeyError(f"{keymap.name}: the key table does not know {name!r}")
        found[renamed[0]] = shape
    return found
