"""The comparison rule of golden/README.md: every key present in a tensor's limits must hold."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KNOWN = {
    "atol",
    "rtol",
    "max_fraction_over",
    "mean_atol",
    "mean_rtol",
    "rms_rtol",
    "max_fraction",
    "max_ulp",
    "ulp_dtype",
    "only_where",
    "given",
    "atol_times_total_grad_norm",
}


@dataclass(frozen=True)
class Verdict:
    """Outcome for one tensor: `error` is the largest absolute difference, `usage` error over limit (<= 1 passes)."""

    name: str
    error: float
    usage: float
    limit: str

    @property
    def passed(self) -> bool:
        return self.usage <= 1.0


def limits_for(tolerance: dict[str, Any], name: str) -> dict[str, Any]:
    """Limits of one tensor: `per_tensor[name]` replaces `default` as a whole."""
    per_tensor = tolerance.get("per_tensor") or {}
    return per_tensor.get(name, tolerance.get("default") or {"atol": 0.0, "rtol": 0.0})


def _ratio(value: float, bound: float) -> float:
    if math.isnan(value):
        return math.inf
    if value <= bound:
        return value / bound if bound > 0 else 0.0
    return value / bound if bound > 0 else math.inf


def _mean(x: Tensor) -> float:
    return float(x.mean()) if x.numel() else 0.0


def _ulp_distance(a: Tensor, b: Tensor, dtype: torch.dtype) -> float:
    """Largest distance in representable steps of `dtype` (sign-magnitude bits mapped to a monotonic integer)."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]

    def ordered(x: Tensor) -> Tensor:
        raw = x.to(dtype).contiguous().view(bits).to(torch.int64)
        return torch.where(raw < 0, -(raw & ((1 << (8 * dtype.itemsize - 1)) - 1)), raw)

    return float((ordered(a) - ordered(b)).abs().max()) if a.numel() else 0.0


def compare(
    name: str,
    computed: Tensor,
    golden: Tensor,
    limits: dict[str, Any],
    tensors: dict[str, Tensor],
    grad_norm: float | None = None,
) -> Verdict:
    """Apply every key of `limits`; `tensors` are the golden's own (for `only_where`)."""
    unknown = set(limits) - KNOWN
    if unknown:
        return Verdict(name, math.inf, math.inf, f"unknown tolerance keys {sorted(unknown)}")
    if tuple(computed.shape) != tuple(golden.shape):
        return Verdict(name, math.inf, math.inf, f"shape {tuple(computed.shape)} != {tuple(golden.shape)}")
    a, b = computed.detach().cpu(), golden.cpu()
    if a.is_complex() or b.is_complex():
        a, b = torch.view_as_real(a.to(torch.complex128)), torch.view_as_real(b.to(torch.complex128))
    if where := limits.get("only_where"):
        guide = tensors[where["tensor"]].double().abs()
        compared = guide >= where.get("abs_min", where.get("rel_min", 0.0) * float(guide.max()))
        a, b = a[compared], b[compared]
    wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
    same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
    diff = torch.where(same, 0.0, (wide_a - wide_b).abs())
    finite = wide_b.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs()  # or what is relative to it would be endless
    scale = float(finite.max()) if finite.numel() else 0.0
    error = float(diff.max()) if diff.numel() else 0.0
    usages: list[tuple[float, str]] = []
    if "atol" in limits or "rtol" in limits or "atol_times_total_grad_norm" in limits:
        atol = limits.get("atol", 0.0)
        if "atol_times_total_grad_norm" in limits:
            if grad_norm is None:
                return Verdict(name, error, math.inf, "atol_times_total_grad_norm needs the total gradient norm")
            atol += limits["atol_times_total_grad_norm"] * grad_norm
        bound = atol + limits.get("rtol", 0.0) * scale
        if "max_fraction_over" in limits:
            share = _mean((~(diff <= bound)).double())
            usages.append((_ratio(share, limits["max_fraction_over"]), f"share over {bound:.1e}"))
        else:
            usages.append((_ratio(error, bound), f"{bound:.1e}"))
    if "mean_atol" in limits or "mean_rtol" in limits:
        bound = limits.get("mean_atol", 0.0) + limits.get("mean_rtol", 0.0) * _mean(finite)
        usages.append((_ratio(_mean(diff), bound), f"mean {bound:.1e}"))
    if "rms_rtol" in limits:
        bound = limits["rms_rtol"] * math.sqrt(_mean(finite.square()))
        usages.append((_ratio(math.sqrt(_mean(diff.square())), bound), f"rms {bound:.1e}"))
    if "max_fraction" in limits:
        share = _mean((~same).double())
        usages.append((_ratio(share, limits["max_fraction"]), f"share differing {limits['max_fraction']:.1e}"))
    if "max_ulp" in limits:
        dtype = getattr(torch, str(limits.get("ulp_dtype", "float32")).removeprefix("torch."))
        usages.append((_ratio(_ulp_distance(a, b, dtype), limits["max_ulp"]), f"{limits['max_ulp']} ulp {dtype}"))
    if not usages:
        usages.append((_ratio(error, 0.0), "exact"))
    usage, limit = max(usages)
    return Verdict(name, error, usage, limit)
