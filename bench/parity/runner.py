"""Run golden cases and judge them."""

import math
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch

from .case import Case
from .registry import find_handler
from .tolerance import Verdict, compare, limits_for


@dataclass
class Result:
    """Outcome of one case; `worst` is the tensor that uses most of its limit."""

    case: Case
    verdicts: list[Verdict] = field(default_factory=list)
    problem: str = ""
    trace: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> Verdict | None:
        return max(self.verdicts, key=lambda v: v.usage, default=None)

    @property
    def passed(self) -> bool:
        return not self.problem and bool(self.verdicts) and all(v.passed for v in self.verdicts)


def _json_value(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def _compare_json(name: str, computed: Any, golden: Any, tolerance: dict[str, Any]) -> Verdict:
    """Numbers within `json_values` (`*` for all), everything else exactly."""
    per_name = tolerance.get("json_values") or {}
    key = name.removeprefix("json.")
    limits = (tolerance.get("per_tensor") or {}).get(name) or per_name.get(key) or per_name.get("*")
    if limits and not isinstance(golden, str | bool):
        a, b = torch.as_tensor(computed, dtype=torch.float64), torch.as_tensor(golden, dtype=torch.float64)
        return compare(name, a, b, limits, {})
    equal = computed == golden
    return Verdict(name, 0.0 if equal else math.inf, 0.0 if equal else math.inf, "exact")


def run_case(case: Case) -> Result:
    """Recompute one case and compare every `out.*`, and every `mid.*` that was not used as an input."""
    result = Result(case)
    started = time.perf_counter()
    handler = find_handler(case)
    if handler is None:
        result.problem = "not understood: no handler for this system and name"
        return result
    try:
        tolerance = case.json.get("tolerance") or {}
        computed = dict(handler(case))
        grad_norm = computed.pop("total_grad_norm", None)
        for name, value in computed.items():
            if name.startswith("json."):
                golden = _json_value(case.json, name.removeprefix("json."))
                result.verdicts.append(_compare_json(name, value, golden, tolerance))
            elif name not in case.tensors:
                result.problem = f"computed {name}, which the golden does not hold"
            else:
                limits = limits_for(tolerance, name)
                result.verdicts.append(compare(name, value, case.tensors[name], limits, case.tensors, grad_norm))
        wanted = [n for n in case.tensors if n.startswith("out.") or (n.startswith("mid.") and n not in case.consumed)]
        missing = [name for name in wanted if name not in computed]
        if missing:
            result.problem = f"not computed: {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}"
        elif not result.verdicts:
            result.problem = "nothing was compared"
    except Exception as error:  # a broken case is a failed case; the others still run
        result.problem = f"{type(error).__name__}: {error}"
        result.trace = traceback.format_exc()
    finally:
        result.seconds = time.perf_counter() - started
    return result
