"""The published training objective of LiveAvatar's first stage: flow matching with block-wise noise (liveavatar.md, 6).

    x_t = (1 - sigma) x0 + sigma eps,    target eps - x0,    weight w(t)

The reduction to a scalar is not published; ours is the mean over latent frames of w(t_f) times the frame's mean error.
"""

from torch import Tensor

from ..runtime.samplers import Schedule, flow_match_schedule, timestep_weights

TRAIN_STEPS = 1000


def training_schedule(
    shift: float = 5.0, steps: int = TRAIN_STEPS, sigma_min: float = 0.0, extra_one_step: bool = True
) -> Schedule:
    """Noise levels of the training time-steps; the defaults are the published arguments."""
    return flow_match_schedule(steps, shift, sigma_min=sigma_min, extra_one_step=extra_one_step)


def share_within_blocks(t: Tensor, frames_per_block: int) -> Tensor:
    """Times [B, F] -> each block's first value for all its frames."""
    if t.shape[-1] % frames_per_block:
        raise ValueError(f"{t.shape[-1]} frames are not whole blocks of {frames_per_block}")
    return t[..., ::frames_per_block].repeat_interleave(frames_per_block, -1)


def noise_level(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sigma and loss weight, each shaped like t, of the nearest table entries; the model still receives t itself."""
    index = schedule.nearest(t)
    return schedule.sigmas[index].to(t.device), timestep_weights(schedule)[index].to(t.device)


def frame_losses(flow: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared velocity error [B, F] of every latent frame of [B, C, F, h, w], in float32."""
    return (flow.float() - (noise.float() - x0.float())).square().mean((1, 3, 4))


def flow_matching_loss(flow: Tensor, x0: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Scalar loss of a predicted flow [B, C, F, h, w] with one weight per frame [B, F]."""
    return (weight * frame_losses(flow, x0, noise)).mean()
