"""Second and third stage: the causal transformer with its speech front end.

Flow matching: one noise level shared by all blocks of a clip, because the cache of a time-step holds history at that
very noise level when generating. Then rollout: the inputs of the first three of the runtime's four Euler steps come
from the model's own earlier steps, so that they meet what they were trained on; the last step keeps to flow matching.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...graphs.models.layers import set_compute_dtype
from ...graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from ...graphs.models.liveavatar_init import init_weights
from ...graphs.models.speech import SpeechConfig, SpeechFrontEnd, to_video_rate
from ...runtime.samplers import euler_schedule
from ..loop import (
    Clock,
    Curve,
    Ema,
    OutOfTime,
    compile_on_gpu,
    load_checkpoint,
    save_checkpoint,
    warmup_cosine,
)
from ..muon import MuonAdamW, split_parameters
from .pool import LatentPool
from .recipe import Recipe, Stage

STEPS = 4
SCHEDULE_SHARE = 0.6  # share of clips trained exactly at the runtime's noise levels, the rest in between
MOVING_WEIGHT = 3.0
REFERENCE_DISTANCE = (4, 43)  # of a clip's first frame; its later blocks come closer
EMBEDDINGS = ("dit.patch_embedding", "dit.cond_encoder", "dit.text_embedding", "dit.time_embedding", "dit.head")
"""First and last layers: AdamW's, as everywhere that Muon is used."""
LONGEST_STREAM = 100_000  # latent frames: over four hours


class TinySystem(nn.Module):
    """Transformer and speech front end, trained together."""

    def __init__(self, dit: LiveAvatarConfig, speech: SpeechConfig):
        super().__init__()
        self.dit = LiveAvatar(dit)
        self.speech = SpeechFrontEnd(speech)
        init_weights(self.dit)

    def forward(self, x: Tensor, sigma: Tensor, batch: dict[str, Tensor], place: "Place") -> Tensor:
        """Flow of noisy clips x [B, 16, F, h, w] at the noise levels sigma [B]."""
        c = self.dit.config
        audio = to_video_rate(self.speech(batch["features"]))  # [B, K, C, 4F]
        return self.dit.forward_train(
            x,
            (1000.0 * sigma)[:, None].expand(-1, x.shape[2]),
            x.new_zeros(1, c.text_len, c.text_dim),
            audio,
            batch["reference"],
            batch["motion"],
            history_blocks=c.cache_frames // c.num_frames_per_block - 1,
            frame_offset=place.frame_offset,
            ref_shift=place.ref_shift,
            audio_per_block=True,
        )


@dataclass(frozen=True)
class Place:
    """Where in a stream each clip stands: absolute latent frame of its first frame, and the reference's shift [B]."""

    frame_offset: Tensor
    ref_shift: Tensor

    @classmethod
    def draw(cls, first: Tensor, generator: torch.Generator) -> "Place":
        """Clips that start their video stand at 0; the others anywhere, log-uniform over hours."""
        count = first.shape[0]
        spread = torch.rand(count, generator=generator)
        offset = 3 * (LONGEST_STREAM / 3.0) ** spread
        frame = torch.where(first.cpu(), 0.0, 3 * (offset / 3).floor()).long()
        distance = torch.randint(*REFERENCE_DISTANCE, (count,), generator=generator)
        shift = torch.where(first.cpu(), 0, (frame + distance - 30).clamp(min=0))
        return cls(frame.to(first.device), shift.to(first.device))


def moving_weight(latents: Tensor) -> Tensor:
    """Loss weight [B, 1, 1, h, w], mean 1: more where the clip's latents change over time."""
    motion = latents.std(2, keepdim=True).mean(1, keepdim=True)
    weight = 1.0 + MOVING_WEIGHT * motion / motion.amax((-2, -1), keepdim=True).clamp(min=1e-3)
    return weight / weight.mean((-2, -1), keepdim=True)


def draw_sigmas(count: int, sigmas: Tensor, generator: torch.Generator) -> Tensor:
    """Noise levels [count]: the runtime's own, or a shifted uniform in between."""
    u = torch.rand(count, generator=generator)
    between = 3.0 * u / (1.0 + 2.0 * u)
    own = sigmas[torch.randint(0, STEPS, (count,), generator=generator)]
    return torch.where(torch.rand(count, generator=generator) < SCHEDULE_SHARE, own, between)


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    s = sigma[:, None, None, None, None]
    return (1.0 - s) * x0 + s * noise


def flow_loss(system: TinySystem, batch: dict[str, Tensor], place: Place, sigmas: Tensor, generator) -> Tensor:
    """Velocity error at one random noise level per clip."""
    x0 = batch["latents"]
    sigma = draw_sigmas(x0.shape[0], sigmas, generator).to(x0.device)
    noise = torch.randn_like(x0)
    flow = system(noised(x0, noise, sigma), sigma, batch, place)
    return (moving_weight(x0) * (flow.float() - (noise - x0)).square()).mean()


@torch.no_grad()
def roll_out(system: TinySystem, batch: dict[str, Tensor], place: Place, sigmas: Tensor, steps: int) -> Tensor:
    """The first `steps` Euler steps from noise; all blocks at once, which is what the stream computes one by one."""
    x = torch.randn_like(batch["latents"])
    for step in range(steps):
        sigma = sigmas[step].expand(x.shape[0]).to(x.device)
        x = x + (sigmas[step + 1] - sigmas[step]).to(x.device) * system(x, sigma, batch, place).float()
    return x


def rollout_loss(system: TinySystem, batch: dict[str, Tensor], place: Place, sigmas: Tensor, generator) -> Tensor:
    """Error of the predicted clean clip at a random one of the first three steps of the model's own rollout."""
    step = int(torch.randint(0, STEPS - 1, (1,), generator=generator))
    x0 = batch["latents"]
    x = roll_out(system, batch, place, sigmas, step)
    sigma = sigmas[step].expand(x.shape[0]).to(x.device)
    clean = x - sigma[0] * system(x, sigma, batch, place).float()
    return (moving_weight(x0) * (clean - x0).square()).mean() / (sigma[0] ** 2 + 0.05)


def train_dit(
    system: TinySystem,
    pool: LatentPool,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    validate: Callable[[TinySystem, Tensor], dict[str, float]],
    clock: Clock,
) -> TinySystem:
    """Train (or resume, or just load) both stages; `validate(system, sigmas)` returns values for the curve.

    Raises OutOfTime, with the checkpoint saved, when the clock expires.
    """
    path = out / "dit.pt"
    sigmas = euler_schedule(STEPS, 3.0).sigmas.float().cpu()
    matrices, others = split_parameters(system, apart=EMBEDDINGS)
    optimizer = MuonAdamW(matrices, others, betas=(0.9, 0.95), weight_decay=0.01)
    ema = Ema(system, 0.999)
    done = {"flow": 0, "rollout": 0}
    if saved := load_checkpoint(path, device):
        system.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.values, done = saved["ema"], saved["done"]
    compile_on_gpu(*system.dit.blocks, device=device)
    if device.type == "cuda":
        set_compute_dtype(system.dit, torch.bfloat16)
    curve = Curve(out / "dit.jsonl")
    generator = torch.Generator().manual_seed(sum(done.values()) + 1)

    def save() -> None:
        state = {"model": system.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.values, "done": done}
        save_checkpoint(path, state)

    stages: list[tuple[str, Stage]] = [("flow", recipe.flow), ("rollout", recipe.rollout)]
    if any(done[name] < stage.steps for name, stage in stages):
        while pool.filled < recipe.pool:
            pool.refill(min(recipe.refill, recipe.pool - pool.filled))
        curve.add(0, pool=pool.filled)
    for name, stage in stages:
        loss_of = flow_loss if name == "flow" else rollout_loss
        total, summed = torch.zeros((), device=device), 0
        while done[name] < stage.steps:
            optimizer.set_learning_rate(warmup_cosine(done[name], stage.steps, stage.rate, stage.warmup))
            if done[name] % recipe.refill_every == 0:
                pool.refill(recipe.refill)
            batch = pool.draw(stage.batch, generator)
            loss = loss_of(system, batch, Place.draw(batch["first"], generator), sigmas, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
            optimizer.step()
            done[name] += 1
            steps = sum(done.values())
            ema.update(system, steps)
            total += loss.detach()
            summed += 1
            if done[name] % stage.report_every == 0:
                curve.add(steps, **{name: total.item() / summed})
                total, summed = torch.zeros((), device=device), 0
            if done[name] % stage.save_every == 0 or done[name] == stage.steps:
                save()
                curve.add(steps, **validate(system, sigmas))
            if clock.expired:
                save()
                raise OutOfTime(f"{name} at step {done[name]} of {stage.steps}")
    ema.copy_to(system)
    return system.eval()
