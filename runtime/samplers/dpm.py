"""DPM-Solver++ multistep for flow models, orders 1 to 3 (specs/wan.md, 3.4).

With m = x - sigma v (prediction of x0), a = 1 - sigma_t, e = exp(-h), h = lambda_t - lambda_s:

    first order: x_t = (sigma_t / sigma_s) x - a (e - 1) m;    higher orders add differences of earlier predictions.

Wan starts at sigma 1, where lambda is -inf: the second step then has D1 = 0 and is first order (kept, quirk 9).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import Schedule
from .unipc import log_snr, require_descent_to_zero, require_next

SHORT_RUN = 15  # below this many steps the second-last step is at most second order


@dataclass(frozen=True)
class DPMConfig:
    """Options under their published names; the defaults are Wan's. `solver_type` matters for order 2 only."""

    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        if self.solver_order not in (1, 2, 3):
            raise ValueError(f"DPM++: solver_order must be 1, 2 or 3, got {self.solver_order}")
        if self.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"DPM++: solver_type must be 'midpoint' or 'heun', got {self.solver_type!r}")


DEFAULT = DPMConfig()


class DPMSolver:
    """One trajectory: call `step` with consecutive indices. A new trajectory needs a new object."""

    def __init__(self, schedule: Schedule, config: DPMConfig = DEFAULT):
        require_descent_to_zero(schedule, "DPM++")
        self.schedule = schedule
        self.config = config
        self.history: list[Tensor] = []  # x0 predictions, newest first
        self.last_index: int | None = None

    def step(self, model_output: Tensor, index: int, sample: Tensor) -> Tensor:
        """Sample at sigmas[index + 1] from the sample and the model's output at sigmas[index]; shape, dtype of sample.

        The update is computed in float32. A trajectory may begin at any index (video to video).
        """
        require_next(index, self.last_index, len(self.schedule), "DPM++")
        x0 = sample - self.schedule.sigmas[index] * model_output
        self.history = [x0.float(), *self.history][: self.config.solver_order]
        self.last_index = index
        return self._advance(sample.float(), index, self._order(index)).to(sample.dtype)

    def _order(self, index: int) -> int:
        left = len(self.schedule) - index
        order = min(self.config.solver_order, len(self.history))
        if left == 1:
            return 1
        if left == 2 and self.config.lower_order_final and len(self.schedule) < SHORT_RUN:
            return min(order, 2)
        return order

    def _advance(self, x: Tensor, index: int, order: int) -> Tensor:
        sigmas = self.schedule.sigmas
        s, t = sigmas[index], sigmas[index + 1]
        a = 1 - t
        h = log_snr(t) - log_snr(s)
        e = torch.exp(-h)
        m = self.history[0]
        x = (t / s) * x - a * (e - 1) * m
        if order == 1:
            return x
        r0 = (log_snr(s) - log_snr(sigmas[index - 1])) / h
        d1 = (m - self.history[1]) / r0
        if order == 2:
            if self.config.solver_type == "midpoint":
                return x - 0.5 * a * (e - 1) * d1
            return x + a * ((e - 1) / h + 1) * d1
        r1 = (log_snr(sigmas[index - 1]) - log_snr(sigmas[index - 2])) / h
        d1_earlier = (self.history[1] - self.history[2]) / r1
        curve = d1 - d1_earlier
        d1 = d1 + r0 / (r0 + r1) * curve
        d2 = curve / (r0 + r1)
        return x + a * ((e - 1) / h + 1) * d1 - a * ((e - 1 + h) / h**2 - 0.5) * d2
