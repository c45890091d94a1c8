"""Tables of what stands around the transformers: the Wan VAE, UMT5, CLIP, wav2vec 2.0, Whisper (wan.md 1.4-1.6, 2.5;
latentsync.md 2.3)."""

from ..keymaps import UMT5, clip_unread_shapes, vae_diffusers_keymap
from .rows import Layer, Shapes, below, conv, expand, linear, norm, scale, tensor
from .wan import in_diffusers, scale_rows


def wan_vae(width: int = 96, latent: int = 16) -> dict[str, Layer]:
    """`Wan2.1_VAE.pth`: flat lists of residual blocks and resamplers (wan.md, 1.4)."""
    one, two, four = width, 2 * width, 4 * width
    table: dict[str, Layer] = {
        "conv1": conv(2 * latent, 2 * latent, 1, 1, 1),
        "conv2": conv(latent, latent, 1, 1, 1),
        "encoder.conv1": conv(one, 3, 3, 3, 3),
        "encoder.head.0.gamma": tensor(four, 1, 1, 1),
        "encoder.head.2": conv(2 * latent, four, 3, 3, 3),
        "decoder.conv1": conv(four, latent, 3, 3, 3),
        "decoder.head.0.gamma": tensor(one, 1, 1, 1),
        "decoder.head.2": conv(3, one, 3, 3, 3),
    }
    down = {0: (one, one), 1: (one, one), 3: (one, two), 4: (two, two), 6: (two, four), 7: (four, four)}
    for place, (inputs, outputs) in (down | {9: (four, four), 10: (four, four)}).items():
        table |= _residual(f"encoder.downsamples.{place}", inputs, outputs)
    for place, channels in ((2, one), (5, two), (8, four)):
        table[f"encoder.downsamples.{place}.resample.1"] = conv(channels, channels, 3, 3)
    for place, channels in ((5, two), (8, four)):
        table[f"encoder.downsamples.{place}.time_conv"] = conv(channels, channels, 3, 1, 1)
    up = dict.fromkeys((0, 1, 2, 5, 6), (four, four)) | {4: (two, four)}
    for place, (inputs, outputs) in (
        up | dict.fromkeys((8, 9, 10), (two, two)) | dict.fromkeys((12, 13, 14), (one, one))
    ).items():
        table |= _residual(f"decoder.upsamples.{place}", inputs, outputs)
    for place, channels in ((3, four), (7, four), (11, two)):
        table[f"decoder.upsamples.{place}.resample.1"] = conv(channels // 2, channels, 3, 3)
    for place in (3, 7):
        table[f"decoder.upsamples.{place}.time_conv"] = conv(2 * four, four, 3, 1, 1)
    for side in ("encoder", "decoder"):
        table |= _residual(f"{side}.middle.<0,2>", four, four)
        table |= {
            f"{side}.middle.1.norm.gamma": tensor(four, 1, 1),
            f"{side}.middle.1.to_qkv": conv(3 * four, four, 1, 1),
            f"{side}.middle.1.proj": conv(four, four, 1, 1),
        }
    return table


def _residual(name: str, inputs: int, outputs: int) -> dict[str, Layer]:
    table = {
        f"{name}.residual.0.gamma": tensor(inputs, 1, 1, 1),
        f"{name}.residual.2": conv(outputs, inputs, 3, 3, 3),
        f"{name}.residual.3.gamma": tensor(outputs, 1, 1, 1),
        f"{name}.residual.6": conv(outputs, outputs, 3, 3, 3),
    }
    return table | ({f"{name}.shortcut": conv(outputs, inputs, 1, 1, 1)} if inputs != outputs else {})


def wan_vae_in_diffusers() -> Shapes:
    """`AutoencoderKLWan`."""
    return in_diffusers(wan_vae(), vae_diffusers_keymap())


def umt5(dim: int = 4096, ffn: int = 10240, layers: int = 24, heads: int = 64, vocab: int = 256384) -> dict[str, Layer]:
    """`models_t5_umt5-xxl-enc-bf16.pth`: the encoder alone (wan.md, 1.5)."""
    block = f"blocks.<0-{layers - 1}>"
    return {
        "token_embedding": scale_rows(vocab, dim),
        "norm": scale(dim),
        f"{block}.norm<1,2>": scale(dim),
        f"{block}.attn.<q,k,v,o>": linear(dim, dim, bias=False),
        f"{block}.ffn.<gate.0,fc1>": linear(ffn, dim, bias=False),
        f"{block}.ffn.fc2": linear(dim, ffn, bias=False),
        f"{block}.pos_embedding.embedding": scale_rows(32, heads),
    }


def umt5_in_transformers() -> Shapes:
    """`UMT5EncoderModel`."""
    return in_diffusers(umt5(), UMT5)


def clip(dim: int = 1280, ffn: int = 5120, layers: int = 32, tokens: int = 257, patch: int = 14) -> Shapes:
    """`models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, the text tower included (wan.md, 1.6)."""
    block = f"visual.transformer.<0-{layers - 1}>"
    table: dict[str, Layer] = {
        "visual.cls_embedding": tensor(1, 1, dim),
        "visual.pos_embedding": tensor(1, tokens, dim),
        "visual.patch_embedding": conv(dim, 3, patch, patch, bias=False),
        "visual.<pre,post>_norm": norm(dim),
        f"{block}.norm<1,2>": norm(dim),
        f"{block}.attn.to_qkv": linear(3 * dim, dim),
        f"{block}.attn.proj": linear(dim, dim),
        f"{block}.mlp.0": linear(ffn, dim),
        f"{block}.mlp.2": linear(dim, ffn),
    }
    return expand(table) | clip_unread_shapes(dim)


def wav2vec2(large: bool) -> dict[str, Layer]:
    """The encoder of wav2vec 2.0, base or large (XLSR-53), with the old names of weight norm (wan.md, 2.5)."""
    dim, ffn, layers = (1024, 4096, 24) if large else (768, 3072, 12)
    convolutions, block = "feature_extractor.conv_layers", f"encoder.layers.<0-{layers - 1}>"
    return {
        "masked_spec_embed": tensor(dim),
        f"{convolutions}.0.conv": conv(512, 1, 10, bias=large),
        f"{convolutions}.<1-4>.conv": conv(512, 512, 3, bias=large),
        f"{convolutions}.<5-6>.conv": conv(512, 512, 2, bias=large),
        f"{convolutions}.{'<0-6>' if large else '0'}.layer_norm": norm(512),
        "feature_projection.layer_norm": norm(512),
        "feature_projection.projection": linear(dim, 512),
        "encoder.pos_conv_embed.conv.bias": tensor(dim),
        "encoder.pos_conv_embed.conv.weight_g": tensor(1, 1, 128),
        "encoder.pos_conv_embed.conv.weight_v": tensor(dim, dim // 16, 128),
        "encoder.layer_norm": norm(dim),
        f"{block}.attention.<q,k,v,out>_proj": linear(dim, dim),
        f"{block}.<layer_norm,final_layer_norm>": norm(dim),
        f"{block}.feed_forward.intermediate_dense": linear(ffn, dim),
        f"{block}.feed_forward.output_dense": linear(dim, ffn),
    }


def whisper(dim: int = 384, layers: int = 4, mels: int = 80, context: int = 1500) -> dict[str, Layer]:
    """The encoder of OpenAI's Whisper, `tiny` (latentsync.md, 2.3)."""
    table: dict[str, Layer] = {
        "conv1": conv(dim, mels, 3),
        "conv2": conv(dim, dim, 3),
        "positional_embedding": tensor(context, dim),
        "ln_post": norm(dim),
        **_whisper_block(f"blocks.<0-{layers - 1}>", dim, ("attn",)),
    }
    return below("encoder.", table)


def whisper_decoder(dim: int = 384, layers: int = 4, vocab: int = 51865, context: int = 448) -> dict[str, Layer]:
    """The decoder in the same file, which no system reads."""
    table: dict[str, Layer] = {
        "token_embedding": scale_rows(vocab, dim),
        "positional_embedding": tensor(context, dim),
        "ln": norm(dim),
        **_whisper_block(f"blocks.<0-{layers - 1}>", dim, ("attn", "cross_attn")),
    }
    return below("decoder.", table)


def _whisper_block(block: str, dim: int, attentions: tuple[str, ...]) -> dict[str, Layer]:
    table: dict[str, Layer] = {
        f"{block}.mlp_ln": norm(dim),
        f"{block}.mlp.0": linear(4 * dim, dim),
        f"{block}.mlp.2": linear(dim, 4 * dim),
    }
    for attention in attentions:
        table |= {
            f"{block}.{attention}_ln": norm(dim),
            f"{block}.{attention}.<query,value,out>": linear(dim, dim),
            f"{block}.{attention}.key": linear(dim, dim, bias=False),
        }
    return table
