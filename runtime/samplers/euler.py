"""Euler steps of the flow ODE (specs/wan.md, 3.2; specs/liveavatar.md, 3.4)."""

from torch import Tensor

from .schedules import Schedule


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x + (sigma_next - sigma) * velocity, in the shape and dtype of x.

    The sigmas are float32, 0-dim or broadcastable to x. Rounding points in half precision: the difference of the sigmas
    and its product with velocity are rounded to velocity's dtype, the sum is taken in float32 and rounded to x's.
    """
    update = (sigma_next - sigma).to(velocity) * velocity
    return (x.float() + update).to(x.dtype)


def batched_euler_step(
    schedule: Schedule,
    x: Tensor,
    velocity: Tensor,
    index: Tensor,
    *,
    to_final: bool = False,
    shared_end: bool = False,
) -> Tensor:
    """One Euler step of x [B, ...] with a step index [B] a sample.

    `to_final` sends every sample to the schedule's final sigma. `shared_end` does so as soon as one sample is at its
    last step, which is what the original training code computes (wan.md, quirk 12).
    """
    if index.shape != x.shape[:1]:
        raise ValueError(f"index must hold one step a sample, [{x.shape[0]}], got {list(index.shape)}")
    index = index.cpu()
    target = schedule.sigmas[index + 1]
    if to_final or (shared_end and bool((index == len(schedule) - 1).any())):
        target = schedule.sigmas[-1].expand_as(target)
    spread = (-1, *[1] * (x.ndim - 1))
    return euler_step(x, velocity, schedule.sigmas[index].view(spread), target.view(spread))
