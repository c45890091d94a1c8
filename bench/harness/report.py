"""A benchmark's report: which machine, which versions, which limits, and every number, as JSON.

Times are seconds, rates FLOP/s and bytes/s, memory bytes. A result has a time only when its status is "ok".
"""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from ...runtime.errors import InputError, OutputError
from .nvml import GpuMonitor, Load
from .roofline import Roofline

SCHEMA = 1
PACKAGES = ("kinora", "torch", "triton", "torchao", "diffusers", "nvidia-cudnn-frontend", "nvidia-ml-py", "numpy")

Status = Literal["ok", "refused", "failed", "unavailable"]
"""refused: the check of the result failed; failed: an error; unavailable: this machine or build does not have it."""


@dataclass(frozen=True)
class KernelShare:
    """One kernel of a profile: its time in one call, its share of all kernels' time, how often it ran."""

    kernel: str
    seconds: float
    share: float
    calls: int


@dataclass(frozen=True)
class Result:
    """One thing timed in one variant; the comparison of two reports matches `name` and `variant`.

    `seconds` median of one call, `spread` between two runs (relative), `samples` in both. `flops`, `bytes`: its work;
    `roofline_seconds` the least time for them at `precision`, `roofline_share` that over `seconds`. `error`: relative
    L2 error of the result, `tolerance` what is allowed. `metrics`: further numbers, such as frames per second.
    """

    name: str
    variant: str
    status: Status
    note: str = ""
    seconds: float | None = None
    spread: float | None = None
    samples: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    precision: str = ""
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    roofline_seconds: float | None = None
    roofline_share: float | None = None
    error: float | None = None
    tolerance: float | None = None
    peak_memory: int | None = None
    load: Load | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    profile: tuple[KernelShare, ...] = ()

    @property
    def throttled(self) -> str:
        """Why the GPU ran below its clocks, "" when it did not (or nobody looked)."""
        reasons = self.load.throttled if self.load else {}
        return ", ".join(f"{name} {share:.0%} of the time" for name, share in reasons.items())


@dataclass
class Report:
    """One run of `kinora bench`; `device` and `versions` as `describe_machine` gives them."""

    command: str
    date: str
    device: dict[str, Any]
    versions: dict[str, str]
    roofline: Roofline | None = None
    results: list[Result] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device["type"] == "cuda"

    @classmethod
    def begin(cls, command: str, device: torch.device, monitor: GpuMonitor | None = None) -> "Report":
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(command, date, describe_device(device, monitor), package_versions())

    def find(self, name: str, variant: str) -> Result | None:
        return next((r for r in self.results if (r.name, r.variant) == (name, variant)), None)

    def save(self, path: Path) -> None:
        """Write the JSON beside, then rename, so that a run cut off while saving keeps the last one.

        Numbers that are not finite, which JSON has not, are left out. OutputError when it cannot be written.
        """
        text = json.dumps(_finite({"schema": SCHEMA, **asdict(self)}), indent=1, allow_nan=False)
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text + "\n")
            part.replace(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read what `save` wrote; InputError for another file."""
        try:
            found = json.loads(path.read_text())
            if found.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            roofline = found.pop("roofline")
            results = [_result(entry) for entry in found.pop("results")]
            return cls(roofline=Roofline(**roofline) if roofline else None, results=results, **found)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no report of kinora bench ({error})") from error


def _finite(tree: Any) -> Any:
    """The tree without the entries of its dicts that are numbers but not finite."""
    if isinstance(tree, dict):
        return {k: _finite(v) for k, v in tree.items() if not isinstance(v, float) or math.isfinite(v)}
    return [_finite(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _result(entry: dict[str, Any]) -> Result:
    known = {field.name for field in fields(Result)}
    if unknown := entry.keys() - known:
        raise ValueError(f"a result has unknown entries {', '.join(sorted(unknown))}")
    load = entry.get("load")
    profile = tuple(KernelShare(**share) for share in entry.get("profile", ()))
    return Result(**{**entry, "load": Load(**load) if load else None, "profile": profile})


def describe_device(device: torch.device, monitor: GpuMonitor | None = None) -> dict[str, Any]:
    """What the numbers were read on."""
    if device.type != "cuda":
        return {"type": device.type, "name": platform.processor() or platform.machine(), "system": platform.platform()}
    found = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": found.name,
        "memory": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": monitor.driver() if monitor else None,
        **(monitor.limits() if monitor else {}),
        "system": platform.platform(),
    }


def package_versions() -> dict[str, str]:
    """Of the packages that numbers depend on, those that are installed; and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
