"""What the GPU was doing meanwhile: clocks, power, temperature, and whether it was throttled, read through NVML.

Optional: without nvidia-ml-py (`pynvml`), or on a CPU, there is no monitor and reports say nothing of it.
"""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

# Bits of nvmlClocksEventReasons (NVML API reference) that slow a busy GPU down; the others are idleness and settings.
THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
GRAPHICS_CLOCK, MEMORY_CLOCK, TEMPERATURE = 0, 2, 0  # NVML_CLOCK_GRAPHICS, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU


@dataclass(frozen=True)
class Load:
    """Of the samples during a measurement: median clocks, mean and highest power, highest temperature, and the share of
    samples in which each reason slowed the GPU down."""

    clock_mhz: int
    memory_clock_mhz: int
    power_watts: float
    power_watts_max: float
    temperature_c: int
    throttled: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sample:
    clock: int
    memory_clock: int
    milliwatts: int
    temperature: int
    reasons: int


class GpuMonitor:
    """Reads one GPU every `interval` seconds from a thread while something is watched.

    `nvml` is the module `pynvml` or anything with its functions; `handle` its handle of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any, interval: float = 0.02):
        self._nvml = nvml
        self._handle = handle
        self._interval = interval
        self._reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or (
            nvml.nvmlDeviceGetCurrentClocksThrottleReasons  # its name before driver 535
        )

    @classmethod
    def open(cls, device: torch.device) -> "GpuMonitor | None":
        """The monitor of a CUDA device, None where NVML does not answer for it."""
        if device.type != "cuda":
            return None
        try:
            nvml: Any = import_module("pynvml")
            nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            monitor = cls(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
            for reading in (monitor._read, monitor.driver, monitor.limits):
                reading()  # a GPU that refuses one of them is told now
        except Exception:  # no package, no library, no permission: measurements go on without it
            return None
        return monitor

    def driver(self) -> str:
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    def limits(self) -> dict[str, float]:
        """Highest clock in MHz and the power limit in W."""
        return {
            "clock_mhz_max": self._nvml.nvmlDeviceGetMaxClockInfo(self._handle, GRAPHICS_CLOCK),
            "power_limit_watts": self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3,
        }

    @contextmanager
    def watch(self) -> Iterator["Watch"]:
        """Sample until the block ends; the yielded `Watch` then has the `load`."""
        watch, done = Watch(), threading.Event()

        def sample() -> None:
            while True:
                try:
                    watch.samples.append(self._read())
                except Exception:  # one failed reading loses a sample, not the measurement
                    watch.failed += 1
                if done.wait(self._interval):
                    return

        thread = threading.Thread(target=sample, name="nvml", daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            done.set()
            thread.join()

    def _read(self) -> _Sample:
        nvml, handle = self._nvml, self._handle
        return _Sample(
            nvml.nvmlDeviceGetClockInfo(handle, GRAPHICS_CLOCK),
            nvml.nvmlDeviceGetClockInfo(handle, MEMORY_CLOCK),
            nvml.nvmlDeviceGetPowerUsage(handle),
            nvml.nvmlDeviceGetTemperature(handle, TEMPERATURE),
            self._reasons(handle),
        )


class Watch:
    """The samples of one measurement."""

    def __init__(self) -> None:
        self.samples: list[_Sample] = []
        self.failed = 0

    @property
    def load(self) -> Load | None:
        """None when no reading succeeded."""
        if not self.samples:
            return None
        count = len(self.samples)
        shares = {name: sum(bool(s.reasons & bit) for s in self.samples) / count for bit, name in THROTTLES.items()}
        watts = [sample.milliwatts / 1e3 for sample in self.samples]
        return Load(
            round(statistics.median(sample.clock for sample in self.samples)),
            round(statistics.median(sample.memory_clock for sample in self.samples)),
            round(statistics.fmean(watts), 1),
            round(max(watts), 1),
            max(sample.temperature for sample in self.samples),
            {name: round(share, 3) for name, share in shares.items() if share},
        )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
