"""Where the time of a call goes, kernel by kernel, from `torch.profiler`."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .report import KernelShare

LONGEST_NAME = 160  # template arguments of a CUDA kernel fill pages


def kernel_shares(call: Callable[[], object], device: torch.device, most: int = 40) -> tuple[KernelShare, ...]:
    """Kernels of one call grouped by name, longest first, at most `most` of them; on a CPU its operators."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities) as recorded:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind, found = DeviceType.CUDA if on_gpu else DeviceType.CPU, []
    for event in recorded.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if seconds > 0 and event.device_type == kind and not getattr(event, "is_user_annotation", False):
            found.append((event.key[:LONGEST_NAME], seconds, event.count))
    total = sum(seconds for _, seconds, _ in found)
    found.sort(key=lambda entry: -entry[1])
    return tuple(KernelShare(name, seconds, seconds / total, count) for name, seconds, count in found[:most])
