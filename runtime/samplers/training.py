"""Training side of flow matching (specs/wan.md, 3.2 and 6; specs/liveavatar.md, 6): noising, targets, weights.

`sigma` is 0-dim, or [B] for one noise level a sample (the leading axis), or already broadcastable.
"""

import torch
from torch import Tensor

from .schedules import Schedule


def _spread(sigma: Tensor, x: Tensor) -> Tensor:
    sigma = sigma.to(x.device)
    return sigma.view(-1, *[1] * (x.ndim - 1)) if sigma.ndim == 1 else sigma


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise, computed in float32, in the dtype of x0."""
    s = _spread(sigma, x0).float()
    return ((1 - s) * x0.float() + s * noise.float()).to(x0.dtype)


def flow_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to output: noise - x0."""
    return noise - x0


def timestep_weights(schedule: Schedule) -> Tensor:
    """Loss weight [n] of every time-step: a bell of width 1000/2 around the middle, shifted to 0, with mean 1."""
    n = len(schedule)
    bell = torch.exp(-2 * ((schedule.timesteps.float() - n / 2) / n) ** 2)
    bell = bell - bell.min()
    return bell * (n / bell.sum())


def x0_from_flow(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Clean sample x - sigma * velocity, computed in float64, in the dtype of x."""
    return (x.double() - _spread(sigma, x).double() * velocity.double()).to(x.dtype)


def flow_from_x0(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Velocity (x - x0) / sigma that leads from x to x0, computed in float64, in the dtype of x; sigma > 0."""
    return ((x.double() - x0.double()) / _spread(sigma, x).double()).to(x.dtype)
