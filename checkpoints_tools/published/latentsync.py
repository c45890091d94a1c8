"""Tables of LatentSync: the U-Net of 1.5 and 1.6, StableSyncNet, SyncNet v2 and the Stable Diffusion VAE
(latentsync.md 1.1, 2.2, 2.4, 6.6)."""

from collections.abc import Sequence

from .rows import Layer, batch_norm, below, conv, linear, norm, tensor

WIDTHS = (320, 640, 1280, 1280)
TIME = 1280
FRAMES = 24  # rows of the temporal position table


def unet(audio: int = 384, motion: bool = True) -> dict[str, Layer]:
    """`latentsync_unet.pt`; without `motion` the first training stage's."""
    table: dict[str, Layer] = {
        "conv_in": conv(WIDTHS[0], 13, 3, 3),
        "time_embedding.linear_1": linear(TIME, WIDTHS[0]),
        "time_embedding.linear_2": linear(TIME, TIME),
        "conv_norm_out": norm(WIDTHS[0]),
        "conv_out": conv(4, WIDTHS[0], 3, 3),
    }
    inputs = WIDTHS[0]
    for level, width in enumerate(WIDTHS):
        block = f"down_blocks.{level}"
        for layer in range(2):
            table |= _resnet(f"{block}.resnets.{layer}", inputs if layer == 0 else width, width)
        if level < 3:
            table |= _attention(f"{block}.attentions.<0,1>", width, audio)
            table[f"{block}.downsamplers.0.conv"] = conv(width, width, 3, 3)
        table |= _motion(f"{block}.motion_modules.<0,1>", width) if motion else {}
        inputs = width
    table |= _resnet("mid_block.resnets.<0,1>", TIME, TIME) | _attention("mid_block.attentions.0", TIME, audio)
    rising = WIDTHS[::-1]
    for level, width in enumerate(rising):
        block, before, skip = f"up_blocks.{level}", rising[max(level - 1, 0)], rising[min(level + 1, 3)]
        widths = (before + width, width + width, width + skip)  # what comes up and what was kept on the way down
        for layer, inputs in enumerate(widths):
            table |= _resnet(f"{block}.resnets.{layer}", inputs, width)
        if level > 0:
            table |= _attention(f"{block}.attentions.<0-2>", width, audio)
        if level < 3:
            table[f"{block}.upsamplers.0.conv"] = conv(width, width, 3, 3)
        table |= _motion(f"{block}.motion_modules.<0-2>", width) if motion else {}
    return table


def _resnet(name: str, inputs: int, outputs: int, time: int = TIME) -> dict[str, Layer]:
    table = {
        f"{name}.norm1": norm(inputs),
        f"{name}.conv1": conv(outputs, inputs, 3, 3),
        f"{name}.norm2": norm(outputs),
        f"{name}.conv2": conv(outputs, outputs, 3, 3),
    }
    if time:
        table[f"{name}.time_emb_proj"] = linear(outputs, time)
    if inputs != outputs:
        table[f"{name}.conv_shortcut"] = conv(outputs, inputs, 1, 1)
    return table


def _feed_forward(name: str, width: int) -> dict[str, Layer]:
    return {f"{name}.ff.net.0.proj": linear(8 * width, width), f"{name}.ff.net.2": linear(width, 4 * width)}


def _attention(name: str, width: int, audio: int) -> dict[str, Layer]:
    block = f"{name}.transformer_blocks.0"
    return {
        f"{name}.norm": norm(width),
        f"{name}.<proj_in,proj_out>": conv(width, width, 1, 1),
        f"{block}.norm<1,2,3>": norm(width),
        f"{block}.attn1.to_<q,k,v>": linear(width, width, bias=False),
        f"{block}.attn2.to_q": linear(width, width, bias=False),
        f"{block}.attn2.to_<k,v>": linear(width, audio, bias=False),
        f"{block}.attn<1,2>.to_out.0": linear(width, width),
        **_feed_forward(block, width),
    }


def _motion(name: str, width: int) -> dict[str, Layer]:
    outer = f"{name}.temporal_transformer"
    block = f"{outer}.transformer_blocks.0"
    return {
        f"{outer}.norm": norm(width),
        f"{outer}.<proj_in,proj_out>": linear(width, width),
        f"{block}.attention_blocks.<0,1>.to_<q,k,v>": linear(width, width, bias=False),
        f"{block}.attention_blocks.<0,1>.to_out.0": linear(width, width),
        f"{block}.attention_blocks.<0,1>.pos_encoder.pe": tensor(1, FRAMES, width),
        f"{block}.<norms.0,norms.1,ff_norm>": norm(width),
        **_feed_forward(block, width),
    }


def stable_syncnet() -> dict[str, Layer]:
    """`stable_syncnet.pt`, the configuration `syncnet_16_pixel_attn`."""
    audio = _syncnet_encoder(1, (32, 64, 128, 256, 512, 1024, 2048), (2, 2, 2, 1, 2, 2, 2), (3, 4))
    visual = _syncnet_encoder(48, (64, 128, 256, 256, 512, 1024, 2048, 2048), (2,) * 8, (4, 5))
    return below("audio_encoder.", audio) | below("visual_encoder.", visual)


def _syncnet_encoder(
    inputs: int, widths: Sequence[int], strides: Sequence[int], attended: Sequence[int]
) -> dict[str, Layer]:
    """One flat list of residual blocks, those in `attended` followed by an attention block."""
    before, place = widths[0], 0
    table: dict[str, Layer] = {"conv_in": conv(before, inputs, 3, 3), "norm_out": norm(widths[-1])}
    for level, (width, stride) in enumerate(zip(widths, strides, strict=True)):
        table |= _resnet(f"down_blocks.{place}", before, width, time=0)
        if stride > 1:
            table[f"down_blocks.{place}.downsample_conv"] = conv(width, width, 3, 3)
        before, place = width, place + 1
        if level in attended:
            name = f"down_blocks.{place}"
            table |= {
                f"{name}.norm<1,2,3>": norm(width),
                f"{name}.<conv_in,conv_out>": conv(width, width, 1, 1),
                f"{name}.attn.to_<q,k,v>": linear(width, width),
                f"{name}.attn.to_out.0": linear(width, width),
                **_feed_forward(name, width),
            }
            place += 1
    return table


def syncnet_v2() -> dict[str, Layer]:
    """`syncnet_v2.model`, the score of lip sync (6.6). Places count every layer, pools included."""
    audio = {0: (64, 1, 3, 3), 4: (192, 64, 3, 3), 8: (384, 192, 3, 3), 11: (256, 384, 3, 3), 14: (256, 256, 3, 3)}
    lip = {0: (96, 3, 5, 7, 7), 4: (256, 96, 1, 5, 5), 8: (256, 256, 1, 3, 3)}
    lip |= {11: (256, 256, 1, 3, 3), 14: (256, 256, 1, 3, 3), 18: (512, 256, 1, 6, 6)}
    table: dict[str, Layer] = {}
    for tower, layers in (("netcnnaud", audio | {18: (512, 256, 5, 4)}), ("netcnnlip", lip)):
        for place, shape in layers.items():
            table[f"{tower}.{place}"] = conv(*shape)
            table[f"{tower}.{place + 1}"] = batch_norm(shape[0])
    table["<netfcaud,netfclip>.0"] = linear(512, 512)
    table["<netfcaud,netfclip>.1"] = batch_norm(512)
    table["<netfcaud,netfclip>.3"] = linear(1024, 512)
    return table


def sd_vae(latent: int = 4) -> dict[str, Layer]:
    """`stabilityai/sd-vae-ft-mse`, diffusers' `AutoencoderKL` (2.2)."""
    widths = (128, 256, 512, 512)
    table: dict[str, Layer] = {
        "encoder.conv_in": conv(widths[0], 3, 3, 3),
        "encoder.conv_norm_out": norm(widths[-1]),
        "encoder.conv_out": conv(2 * latent, widths[-1], 3, 3),
        "quant_conv": conv(2 * latent, 2 * latent, 1, 1),
        "post_quant_conv": conv(latent, latent, 1, 1),
        "decoder.conv_in": conv(widths[-1], latent, 3, 3),
        "decoder.conv_norm_out": norm(widths[0]),
        "decoder.conv_out": conv(3, widths[0], 3, 3),
    }
    for side, levels, blocks, sampler in (
        ("encoder.down_blocks", widths, 2, "downsamplers"),
        ("decoder.up_blocks", widths[::-1], 3, "upsamplers"),
    ):
        inputs = levels[0]
        for level, width in enumerate(levels):
            for block in range(blocks):
                table |= _resnet(f"{side}.{level}.resnets.{block}", inputs, width, time=0)
                inputs = width
            if level < len(levels) - 1:
                table[f"{side}.{level}.{sampler}.0.conv"] = conv(width, width, 3, 3)
    middle, width = "<encoder,decoder>.mid_block", widths[-1]
    return (
        table
        | _resnet(f"{middle}.resnets.<0,1>", width, width, time=0)
        | {
            f"{middle}.attentions.0.group_norm": norm(width),
            f"{middle}.attentions.0.to_<q,k,v>": linear(width, width),
            f"{middle}.attentions.0.to_out.0": linear(width, width),
        }
    )
