"""First stage: the causal VAE, trained from scratch on drawn clips to reconstruct them from compact latents.

The VAE looks far back, so a stream settles only after many frames: clips are trained in pieces, each with the history
of the pieces before it, which costs no more than short clips and shows the network the frames of an endless video.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...graphs.models.wan_vae import DecoderState, EncoderState, VaeConfig, WanVae
from ..capture import CapturedStep
from ..loop import Clock, Curve, Ema, OutOfTime, load_checkpoint, save_checkpoint, warmup_cosine
from ..muon import MuonAdamW, split_parameters
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
STREAMS = 4  # batches of clips that are trained in turn


class History(NamedTuple):
    """What the pieces of a batch of clips so far left in the slots of both networks."""

    encoder: list[Tensor]
    decoder: list[Tensor]


def edges(video: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbouring pixels."""
    return video[..., 1:] - video[..., :-1], video[..., 1:, :] - video[..., :-1, :]


def pieces(source: ClipSource, recipe: Recipe) -> Iterator[tuple[bool, Tensor]]:
    """Endless training pieces: 17 frames that open a clip (True), then 16 more at a time (False)."""
    while True:
        clip = source.crops(recipe.vae.batch, recipe.vae_frames, recipe.vae_crop)
        for index, piece in enumerate(clip.split([17] + [16] * (recipe.vae_pieces - 1), 2)):
            yield index == 0, piece


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
        dim_mult=(1, 1, 2, 2),
        num_res_blocks=1,
        temporal_downsample=(False, True, True),
        latent_mean=(0.0,) * LATENT_CHANNELS,
        latent_std=(1.0,) * LATENT_CHANNELS,
    )


def channels_last(vae: WanVae) -> WanVae:
    """The same VAE with the memory layout that its convolutions run fastest in."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return vae


@torch.no_grad()
def with_statistics(vae: WanVae, video: Tensor) -> WanVae:
    """The same weights under a configuration whose latents of `video` have mean 0 and deviation 1 per channel."""
    latents = vae.encode(video)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    config = replace(vae.config, latent_mean=tuple(mean.tolist()), latent_std=tuple(std.tolist()))
    normalised = WanVae(config).to(video.device)
    normalised.load_state_dict(vae.state_dict())
    return normalised.eval().requires_grad_(False)


class VaeStep(nn.Module):
    """Encode and decode one piece of a clip, and what is wrong with the result."""

    def __init__(self, vae: WanVae):
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, history: History) -> tuple[Tensor, Tensor, Tensor, History]:
        """Piece [B, 3, T, S, S] -> loss, KL divergence, PSNR, and the history after it, without its graph."""
        opens = not history.encoder
        before, after = EncoderState(list(history.encoder)), DecoderState(list(history.decoder))
        mean, logvar = self.vae.stream_moments(video, before)
        mean, logvar = mean.float(), logvar.float().clamp(-20.0, 10.0)
        noise = (0.5 * logvar).exp() + LATENT_NOISE * mean.detach().std()
        decoded = self.vae.decode_stream(mean + noise * torch.randn_like(mean), after, clamp=False)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        loss = reconstruction_loss(decoded, video, opens) + KL_WEIGHT * divergence
        detached = History(*([slot.detach() for slot in state.slots] for state in (before, after)))
        return loss, divergence.detach(), psnr(decoded.detach(), video), detached


class Trainer:
    """One optimiser step a piece, in `dtype` on float32 weights; the two kinds of pieces are captured on a GPU."""

    def __init__(self, vae: WanVae, optimizer: MuonAdamW, device: torch.device, dtype: torch.dtype):
        self.round = VaeStep(vae)
        self.optimizer = optimizer
        self.dtype = dtype
        self.encoder_slots = 0  # known after the first piece
        self.opening, self.following = CapturedStep(self._step, device), CapturedStep(self._step, device)

    def _step(self, video: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        history = self._split(slots)
        low = {name: p.to(self.dtype) for name, p in self.round.named_parameters()}
        loss, divergence, quality, history = functional_call(self.round, low, (video, history))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.round.parameters(), 1.0)
        self.optimizer.step()
        self.encoder_slots = len(history.encoder)
        return loss.detach(), divergence, quality, *history.encoder, *history.decoder

    def __call__(self, video: Tensor, history: History | None) -> tuple[Tensor, Tensor, Tensor, History]:
        """Train on a piece; `history` of the clip so far, None for its first piece. The history is a copy."""
        if history is None:
            loss, divergence, quality, *slots = self.opening(video)
        else:
            loss, divergence, quality, *slots = self.following(video, *history.encoder, *history.decoder)
        return loss, divergence, quality, self._split([slot.clone() for slot in slots])

    def _split(self, slots: Sequence[Tensor]) -> History:
        """Flat slots, none before a clip's first piece, as a history."""
        return History(list(slots[: self.encoder_slots]), list(slots[self.encoder_slots :]))


def train_vae(source: ClipSource, recipe: Recipe, out: Path, device: torch.device, clock: Clock) -> WanVae:
    """Train (or resume, or just load) the VAE; its configuration then holds measured latent statistics.

    Raises OutOfTime, with the checkpoint saved, when the clock expires.
    """
    stage, path = recipe.vae, out / "vae.pt"
    vae = channels_last(WanVae(vae_config(recipe)).to(device))
    optimizer = MuonAdamW(*split_parameters(vae), betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(vae, 0.999)
    step = 0
    if saved := load_checkpoint(path, device):
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.values, step = saved["ema"], saved["step"]
    curve = Curve(out / "vae.jsonl")
    vae.train()
    trainer = Trainer(vae, optimizer, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    # several clips in turn: neighbouring steps see different faces
    streams = [pieces(source, recipe) for _ in range(STREAMS)]
    histories: list[History | None] = [None] * STREAMS
    while step < stage.steps:
        turn = step % STREAMS
        optimizer.set_learning_rate(warmup_cosine(step, stage.steps, stage.rate, stage.warmup))
        opens, video = next(streams[turn])
        video = video.contiguous(memory_format=torch.channels_last_3d)
        loss, divergence, quality, histories[turn] = trainer(video, None if opens else histories[turn])
        ema.update(vae, step)
        step += 1
        if step % stage.report_every == 0:
            curve.add(step, loss=loss.item(), kl=divergence.item(), psnr=quality.item())
        if step % stage.save_every == 0 or step == stage.steps or clock.expired:
            save_checkpoint(
                path,
                {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.values, "step": step},
            )
        if clock.expired:
            raise OutOfTime(f"VAE at step {step} of {stage.steps}")
    ema.copy_to(vae)
    return with_statistics(vae, source.fork(STATISTICS_SEED).videos(2 * stage.batch, recipe.vae_frames))
