"""What every training stage needs: learning-rate schedule, curve log, checkpoints that survive a cut-off run."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def warmup_cosine(step: int, total: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Learning rate at `step`: linear to `peak` over `warmup` steps, then a cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def compile_on_gpu(*modules: nn.Module, device: torch.device) -> None:
    """Compile modules in place for fixed shapes; on a CPU they stay as they are."""
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # one graph serves all blocks, but each counts
        for module in modules:
            module.compile(dynamic=False)


class OutOfTime(Exception):
    """The run's time is over; its checkpoint is saved and the same command goes on from it."""


class Clock:
    """Stops a run after `minutes` (None: never), at a step's end."""

    def __init__(self, minutes: float | None = None):
        self.end = None if minutes is None else time.perf_counter() + 60.0 * minutes

    @property
    def expired(self) -> bool:
        return self.end is not None and time.perf_counter() >= self.end


class Curve:
    """Training curve as JSON lines: one row a report, flushed at once, appended to after a resume."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.started = time.perf_counter()

    def add(self, step: int, **values: float) -> None:
        row = {"step": step, "seconds": round(time.perf_counter() - self.started, 1)}
        row |= {key: round(float(value), 6) for key, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{self.path.stem}: " + "  ".join(f"{k} {v:g}" for k, v in row.items()), flush=True)


class Ema:
    """Exponential moving average of a module's parameters, with the usual warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names, params = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_([self.values[n] for n in names], [p.detach().float() for p in params], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(self.values[name])


def save_checkpoint(path: Path, state: dict[str, Any] | Tensor) -> None:
    """Write beside, then rename: a run cut off while saving keeps the previous checkpoint, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state saved at `path`, or None when there is none yet."""
    if not path.is_file():
        return None
    return torch.load(path, map_location=device, weights_only=True)
