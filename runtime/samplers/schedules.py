"""Sigma tables of the flow solvers (specs/wan.md, 3.1): one builder a published table, bit-exact.

    x_sigma = (1 - sigma) x0 + sigma eps,    t = 1000 sigma,    shift S_s(u) = s u / (1 + (s - 1) u)

Every table is a `Schedule`. The order and the precision of the operations are those of the original builders, since
checkpoints are called with exactly these numbers (integer time-steps come from a float64 truncation).
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

TRAIN_STEPS = 1000
Number = TypeVar("Number", float, np.ndarray, Tensor)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of a sampling run, on the CPU.

    sigmas: float32 [n + 1]; step i goes from sigmas[i] to sigmas[i + 1]; the last one is the final level.
    timesteps: [n], what the model receives: int64 (UniPC, DPM++ tables) or float32.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        if self.timesteps.ndim != 1 or self.sigmas.shape != (len(self.timesteps) + 1,):
            raise ValueError(
                f"a schedule of n time-steps needs n + 1 sigmas, got shapes {tuple(self.timesteps.shape)} "
                f"and {tuple(self.sigmas.shape)}"
            )

    def __len__(self) -> int:
        """Number of steps n."""
        return len(self.timesteps)

    def index_of(self, timestep: float) -> int:
        """Index of an exact entry of `timesteps`; of a duplicated entry the second one, as the original solvers do."""
        found = torch.nonzero(self.timesteps == timestep).flatten()
        if not len(found):
            raise ValueError(f"time-step {float(timestep):g} is not in the table; use nearest() or step by index")
        return int(found[1 if len(found) > 1 else 0])

    def nearest(self, timesteps: Tensor) -> Tensor:
        """int64 indices, shape of `timesteps`, of the nearest table entries; the first one on ties."""
        distance = (self.timesteps - timesteps.detach().cpu().flatten()[:, None]).abs()  # [N, n]
        return distance.argmin(1).reshape(timesteps.shape)


def shifted(u: Number, shift: float) -> Number:
    """S_s(u) = s u / (1 + (s - 1) u) of a number, an array or a tensor, in its own dtype."""
    return shift * u / (1 + (shift - 1) * u)


def _check(steps: int, shift: float = 1.0) -> None:
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be a positive number, got {shift}")


def _integer_schedule(sigmas: np.ndarray) -> Schedule:
    """Schedule of float64 sigmas: final 0 appended, integer time-steps by truncation of the float64 product."""
    return Schedule(
        torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32)),
        torch.from_numpy((sigmas * TRAIN_STEPS).astype(np.int64)),
    )


def _unipc_grid(steps: int) -> np.ndarray:
    top = float(np.float32(1 - 1 / TRAIN_STEPS))  # the constructor keeps its largest sigma in float32
    return np.linspace(top, 0.0, steps + 1)[:steps]


def unipc_schedule(steps: int, shift: float) -> Schedule:
    """FlowUniPC table, also the own table of FlowDPM++; starts at S_s(0.99900001)."""
    _check(steps, shift)
    return _integer_schedule(shifted(_unipc_grid(steps), shift))


def unipc_dynamic_schedule(steps: int, mu: float) -> Schedule:
    """FlowUniPC table with dynamic shifting: sigma = e^mu / (e^mu + 1/u - 1) in float64."""
    _check(steps)
    if not math.isfinite(mu):
        raise ValueError(f"dynamic shifting needs a finite mu, got {mu}")
    return _integer_schedule(math.exp(mu) / (math.exp(mu) + 1 / _unipc_grid(steps) - 1))


def wan_dpm_schedule(steps: int, shift: float) -> Schedule:
    """The table that Wan hands to FlowDPM++; starts at sigma 1."""
    _check(steps, shift)
    return _integer_schedule(shifted(np.linspace(1.0, 0.0, steps + 1)[:steps], shift))


def flow_match_schedule(
    steps: int,
    shift: float = 3.0,
    *,
    sigma_min: float = 0.003 / 1.002,
    extra_one_step: bool = False,
    denoising_strength: float = 1.0,
    inverse_timesteps: bool = False,
    reverse_sigmas: bool = False,
) -> Schedule:
    """FlowMatchScheduler table, float32 time-steps; the defaults are the published class's.

    `inverse_timesteps` flips the grid before the shift, `reverse_sigmas` takes 1 - sigma after it; both end at 1.
    """
    _check(steps, shift)
    start = sigma_min + (1 - sigma_min) * denoising_strength
    grid = torch.linspace(start, sigma_min, steps + extra_one_step, dtype=torch.float32)[:steps]
    sigmas = shifted(grid.flip(0) if inverse_timesteps else grid, shift)
    if reverse_sigmas:
        sigmas = 1 - sigmas
    final = torch.full((1,), float(inverse_timesteps or reverse_sigmas))
    return Schedule(torch.cat((sigmas, final)), sigmas * TRAIN_STEPS)


def euler_schedule(steps: int, shift: float) -> Schedule:
    """Table of diffusers' FlowMatchEulerDiscreteScheduler, as LiveAvatar (shift 3) and StableAvatar (shift 5) use it.

    The low end is shifted twice: the grid ends at the float32 S_s(1/1000) and is shifted again (liveavatar.md, 3.4).
    """
    _check(steps, shift)
    ends = shifted(torch.tensor([TRAIN_STEPS, 1.0]) / TRAIN_STEPS, shift).double() * TRAIN_STEPS
    grid = np.linspace(float(ends[0]), float(ends[1]), steps) / TRAIN_STEPS
    sigmas = torch.from_numpy(shifted(grid, shift).astype(np.float32))
    return Schedule(torch.cat((sigmas, torch.zeros(1))), sigmas * TRAIN_STEPS)


def skyreels_avatar_schedule(steps: int, shift: float) -> Schedule:
    """Table of the SkyReels talking avatar: numpy's float32 linspace(1000, 1), shifted in float32; sigma = t / 1000."""
    _check(steps, shift)
    grid = torch.from_numpy(np.linspace(TRAIN_STEPS, 1, steps, dtype=np.float32))
    timesteps = shifted(grid / TRAIN_STEPS, shift) * TRAIN_STEPS
    return Schedule(torch.cat((timesteps / TRAIN_STEPS, torch.zeros(1))), timesteps)
