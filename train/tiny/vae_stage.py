"""First stage: the causal VAE, trained from scratch on drawn clips to reconstruct them from compact latents.

The VAE looks far back, so a stream settles only after many frames: clips are trained in pieces, each with the history
of the pieces before it, which costs no more than short clips and shows the network the frames of an endless video.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graphs.models.wan_vae import DecoderState, EncoderState, VaeConfig, WanVae
from ..loop import (
    Clock,
    Curve,
    Ema,
    OutOfTime,
    compile_on_gpu,
    load_checkpoint,
    save_checkpoint,
    set_learning_rate,
    warmup_cosine,
)
from .clips import ClipSource
from .recipe import Recipe

LATENT_CHANNELS = 16
STATISTICS_SEED = 12345
KL_WEIGHT = 5e-5
EDGE_WEIGHT = 0.5
COLOUR_WINDOW, COLOUR_WEIGHT = 16, 2.0  # flat regions must keep their colour over a whole stream
MOVING_WEIGHT = 4.0  # extra weight of pixels that differ from the clip's first frame: mouth, lids, head outline
FIRST_WEIGHT = 5.0  # of the first frame, which has a latent frame of its own and no history
LATENT_NOISE = 0.01  # share of the latent's spread: the decoder meets imperfect latents at generation


def edges(video: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbouring pixels."""
    return video[..., 1:] - video[..., :-1], video[..., 1:, :] - video[..., :-1, :]


def pieces(source: ClipSource, recipe: Recipe) -> Iterator[tuple[bool, Tensor]]:
    """Endless training pieces: 17 frames that open a clip (True), then 16 more at a time (False)."""
    while True:
        clip = source.crops(recipe.vae.batch, recipe.vae_frames, recipe.vae_crop)
        for index, piece in enumerate(clip.split([17] + [16] * (recipe.vae_pieces - 1), 2)):
            yield index == 0, piece


def detach(state: EncoderState | DecoderState) -> None:
    """Keep a stream's history and forget how it was computed."""
    state.slots = [slot.detach() for slot in state.slots]


def reconstruction_loss(decoded: Tensor, video: Tensor, opens: bool) -> Tensor:
    """L1 with more weight on a clip's first frame and where the face moves, plus L1 of edges and of mean colours."""
    moving = (video - video[:, :, :1]).abs().amax(1, keepdim=True).clamp(max=1.0)
    weight = 1.0 + MOVING_WEIGHT * moving
    if opens:
        weight[:, :, 0] = FIRST_WEIGHT
    pixel = ((decoded - video).abs() * weight).mean()
    blurred, wanted = (F.avg_pool3d(clip, (1, COLOUR_WINDOW, COLOUR_WINDOW)) for clip in (decoded, video))
    colour = F.l1_loss(blurred, wanted)
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(video), strict=True))
    return pixel + EDGE_WEIGHT * edge + COLOUR_WEIGHT * colour


def psnr(decoded: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return 10.0 * torch.log10(4.0 / F.mse_loss(decoded, video))


def vae_config(recipe: Recipe) -> VaeConfig:
    """The tiny VAE: wide where the picture is large, one residual block a level, latents not yet normalised."""
    return VaeConfig(
        dim=recipe.vae_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=(1, 1, 2, 3),
        num_res_blocks=1,
        temporal_downsample=(False, True, True),
        latent_mean=(0.0,) * LATENT_CHANNELS,
        latent_std=(1.0,) * LATENT_CHANNELS,
    )


@torch.no_grad()
def with_statistics(vae: WanVae, video: Tensor) -> WanVae:
    """The same weights under a configuration whose latents of `video` have mean 0 and deviation 1 per channel."""
    latents = vae.encode(video)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    config = replace(vae.config, latent_mean=tuple(mean.tolist()), latent_std=tuple(std.tolist()))
    normalised = WanVae(config).to(video.device)
    normalised.load_state_dict(vae.state_dict())
    return normalised.eval().requires_grad_(False)


def train_vae(source: ClipSource, recipe: Recipe, out: Path, device: torch.device, clock: Clock) -> WanVae:
    """Train (or resume, or just load) the VAE; its configuration then holds measured latent statistics.

    Raises OutOfTime, with the checkpoint saved, when the clock expires.
    """
    stage, path = recipe.vae, out / "vae.pt"
    vae = WanVae(vae_config(recipe)).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=stage.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(vae, 0.999)
    step = 0
    if saved := load_checkpoint(path, device):
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.values, step = saved["ema"], saved["step"]
    compile_on_gpu(vae.encoder, vae.decoder, device=device)
    curve = Curve(out / "vae.jsonl")
    vae.train()
    stream = pieces(source, recipe)
    before, after = EncoderState(), DecoderState()
    while step < stage.steps:
        set_learning_rate(optimizer, warmup_cosine(step, stage.steps, stage.rate, stage.warmup))
        opens, video = next(stream)
        if opens:
            before, after = EncoderState(), DecoderState()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, logvar = vae.stream_moments(video, before)
            mean, logvar = mean.float(), logvar.float().clamp(-20.0, 10.0)
            noise = (0.5 * logvar).exp() + LATENT_NOISE * mean.detach().std()
            sampled = mean + noise * torch.randn_like(mean)
            decoded = vae.decode_stream(sampled, after, clamp=False)
        loss = reconstruction_loss(decoded, video, opens)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        detach(before)
        detach(after)
        ema.update(vae, step)
        step += 1
        if step % stage.report_every == 0:
            curve.add(step, loss=loss.item(), kl=divergence.item(), psnr=psnr(decoded, video).item())
        if step % stage.save_every == 0 or step == stage.steps or clock.expired:
            save_checkpoint(
                path,
                {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.values, "step": step},
            )
        if clock.expired:
            raise OutOfTime(f"VAE at step {step} of {stage.steps}")
    ema.copy_to(vae)
    return with_statistics(vae, source.fork(STATISTICS_SEED).videos(2 * stage.batch, recipe.vae_frames))
