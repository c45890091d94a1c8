"""UniPC for flow models: unified predictor-corrector on the data prediction (specs/wan.md, 3.3).

Notation: alpha = 1 - sigma, lambda = log(alpha) - log(sigma); m = x - sigma v is the prediction of x0. Going from
sigma_s to sigma_t with h = lambda_t - lambda_s and order p:

    x_t = (sigma_t / sigma_s) x_s - alpha_t phi1 m_s - alpha_t B sum_j rho_j D_j,    phi1 = expm1(-h)

Coefficients are float32 0-dim tensors, as in the original.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import Schedule


@dataclass(frozen=True)
class UniPCConfig:
    """Options under their published names; the defaults are Wan's.

    `bh1` and `lower_order_final=False` divide 0 by 0 in the last step (to sigma 0): they are accepted only together
    with `stop_before_last`, by which the caller promises not to take it. ValueError on what the original gets wrong.
    """

    solver_order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    predict_x0: bool = True
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    final_sigmas_type: str = "zero"
    stop_before_last: bool = False

    def __post_init__(self) -> None:
        if self.solver_order < 1:
            raise ValueError(f"UniPC: solver_order must be 1 or more, got {self.solver_order}")
        if self.solver_type not in ("bh1", "bh2"):
            raise ValueError(f"UniPC: solver_type must be 'bh2' or 'bh1', got {self.solver_type!r}")
        if not self.predict_x0:
            raise ValueError("UniPC: predict_x0=False has the wrong sign for flow models; leave it True")
        if self.final_sigmas_type != "zero":
            raise ValueError(f"UniPC: final_sigmas_type must be 'zero', got {self.final_sigmas_type!r}")
        if not self.stop_before_last and (self.solver_type == "bh1" or not self.lower_order_final):
            raise ValueError(
                "UniPC: solver_type='bh1' and lower_order_final=False give NaN in the last step; use bh2 with "
                "lower_order_final, or set stop_before_last and do not take that step"
            )
        if self.thresholding and not (0 < self.dynamic_thresholding_ratio <= 1 and self.sample_max_value >= 1):
            raise ValueError("UniPC: thresholding needs a ratio in (0, 1] and a sample_max_value of at least 1")


DEFAULT = UniPCConfig()


def log_snr(sigma: Tensor) -> Tensor:
    """lambda = log(1 - sigma) - log(sigma): -inf at sigma 1, +inf at 0."""
    return torch.log(1 - sigma) - torch.log(sigma)


def threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Dynamic thresholding of x0 [B, ...]: clamp to the `ratio` quantile of |x0| in [1, max_value], divide by it."""
    limit = torch.quantile(x0.float().abs().flatten(1), ratio, dim=1).clamp(1.0, max_value)
    limit = limit.view(-1, *[1] * (x0.ndim - 1))
    return (x0.float().clamp(-limit, limit) / limit).to(x0.dtype)


def require_descent_to_zero(schedule: Schedule, solver: str) -> None:
    """Multistep solvers integrate from high noise to sigma 0: ValueError for any other table."""
    sigmas = schedule.sigmas
    if float(sigmas[-1]) != 0.0 or not bool((sigmas.diff() < 0).all()) or float(sigmas[0]) > 1.0:
        raise ValueError(f"{solver} needs sigmas that fall from at most 1 to exactly 0; this table does not")


class UniPC:
    """One trajectory: call `step` with consecutive indices. A new trajectory needs a new object."""

    def __init__(self, schedule: Schedule, config: UniPCConfig = DEFAULT):
        require_descent_to_zero(schedule, "UniPC")
        if float(schedule.sigmas[0]) == 1.0:
            raise ValueError("UniPC: a table that starts at sigma 1 gives NaN in the second step; use unipc_schedule")
        self.schedule = schedule
        self.config = config
        self.history: list[Tensor] = []  # x0 predictions, newest first
        self.last_index: int | None = None
        self.last_sample: Tensor | None = None
        self.last_order = 0
        self.steps_done = 0

    def step(self, model_output: Tensor, index: int, sample: Tensor) -> Tensor:
        """Sample at sigmas[index + 1] from the sample and the model's output at sigmas[index]; shape, dtype of sample.

        A trajectory may begin at any index (video to video).
        """
        config, n = self.config, len(self.schedule)
        require_next(index, self.last_index, n, "UniPC")
        if config.stop_before_last and index == n - 1:
            raise ValueError("UniPC: this configuration has no last step (stop_before_last): it would give NaN")
        x0 = sample - self.schedule.sigmas[index] * model_output
        if config.thresholding:
            x0 = threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
        if self.last_sample is not None and index - 1 not in config.disable_corrector:
            corrected = self._advance(self.last_sample, index - 1, self.last_order, x0)
            sample = corrected.to(sample.dtype)
        self.history = [x0, *self.history][: config.solver_order]
        order = min(config.solver_order, self.steps_done + 1)
        if config.lower_order_final:
            order = min(order, n - index)
        result = self._advance(sample, index, order, None).to(sample.dtype)
        self.last_sample, self.last_order, self.last_index = sample, order, index
        self.steps_done += 1
        return result

    def _advance(self, x: Tensor, index: int, order: int, target_x0: Tensor | None) -> Tensor:
        """Predictor from `index` to the next level; with the prediction made there (`target_x0`), the corrector."""
        sigmas = self.schedule.sigmas
        s, t = sigmas[index], sigmas[index + 1]
        alpha_t = 1 - t
        h = log_snr(t) - log_snr(s)
        phi1 = torch.expm1(-h)
        scale = -h if self.config.solver_type == "bh1" else phi1
        m = self.history[0]
        ratios = [(log_snr(sigmas[index - j]) - log_snr(s)) / h for j in range(1, order)]
        slopes = [(self.history[j] - m) / r for j, r in enumerate(ratios, 1)]
        system, rhs = _order_conditions(h, scale, torch.stack([*ratios, torch.ones(())]))
        if target_x0 is not None:
            slopes.append(target_x0 - m)
            rho = torch.linalg.solve(system, rhs) if order > 1 else torch.tensor([0.5])
        else:
            rho = torch.linalg.solve(system[:-1, :-1], rhs[:-1]) if order > 2 else torch.tensor([0.5])
        x = (t / s) * x - alpha_t * phi1 * m
        if slopes:
            x = x - alpha_t * scale * sum(weight * slope for weight, slope in zip(rho, slopes, strict=True))
        return x


def _order_conditions(h: Tensor, scale: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix [p, p] of the powers of `ratios` and right-hand side [p] that the weights rho must satisfy."""
    hh = -h
    phi = torch.expm1(hh) / hh - 1
    factorial = 1.0
    rhs = []
    for k in range(1, len(ratios) + 1):
        rhs.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    return torch.stack([ratios**k for k in range(len(ratios))]), torch.stack(rhs)


def require_next(index: int, last: int | None, steps: int, solver: str) -> None:
    """ValueError unless `index` is a step of the table and follows the last one taken."""
    if not 0 <= index < steps:
        raise ValueError(f"{solver}: step index {index} is outside the table of {steps} steps")
    if last is not None and index != last + 1:
        raise ValueError(
            f"{solver}: step {index} after step {last}; a solver takes consecutive steps, make a new one to start again"
        )
