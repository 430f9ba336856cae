"""The one place that knows devices: CUDA (and ROCm), Intel XPU by torch's own support, Apple MPS, CPU."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from types import ModuleType

import torch

GIB = 2**30


def _module(kind: str) -> ModuleType | None:
    """torch's module for an accelerator (`torch.cuda`, `torch.xpu`, `torch.mps`); None for the CPU."""
    return getattr(torch, kind, None) if kind in ("cuda", "xpu", "mps") else None


def is_available(kind: str) -> bool:
    """Whether `cuda`, `xpu`, `mps` or `cpu` can compute here."""
    if kind == "cpu":
        return True
    if kind == "mps":
        return torch.backends.mps.is_available()
    module = _module(kind)
    return module is not None and module.is_available()


def pick_device(preferred: str | torch.device | None = None) -> torch.device:
    """`preferred` when given, else the best device of this machine."""
    if preferred is not None:
        return torch.device(preferred)
    return torch.device(next(kind for kind in ("cuda", "xpu", "mps", "cpu") if is_available(kind)))


def empty_cache(device: str | torch.device | None = None) -> None:
    """Collect garbage and give cached device memory back; on the CPU only the first."""
    gc.collect()
    kind = pick_device(device).type
    module = _module(kind)
    if module is not None and is_available(kind):
        module.empty_cache()


def synchronize(device: str | torch.device) -> None:
    """Wait for the device's queue (for timing; never inside a step)."""
    module = _module(torch.device(device).type)
    if module is not None:
        module.synchronize()


def default_generator(device: str | torch.device) -> torch.Generator:
    """torch's global generator of a device, for foreign callers that seed it."""
    device = torch.device(device)
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = _module(device.type)
    if module is None:
        return torch.default_generator
    return module.default_generators[module.current_device() if device.index is None else device.index]


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Bytes of memory; None where the device or system does not say.

    Attributes:
        used: allocated by tensors now (CPU: resident set of the process).
        peak: most that was allocated since the start or `reset_peak_memory` (CPU: since the start).
        total: of the device (CPU: of the machine).
    """

    used: int | None
    peak: int | None
    total: int | None


def memory_stats(device: str | torch.device) -> MemoryStats:
    """Memory of one device as the allocator counts it."""
    device = torch.device(device)
    if device.type in ("cuda", "xpu"):
        module = _module(device.type)
        total = module.get_device_properties(device).total_memory
        return MemoryStats(module.memory_allocated(device), module.max_memory_allocated(device), total)
    if device.type == "mps":
        return MemoryStats(torch.mps.current_allocated_memory(), None, torch.mps.recommended_max_memory())
    return _process_memory()


def reset_peak_memory(device: str | torch.device) -> None:
    """Start a new peak, where the device keeps one."""
    device = torch.device(device)
    if device.type in ("cuda", "xpu"):
        _module(device.type).reset_peak_memory_stats(device)


def _process_memory() -> MemoryStats:
    """Memory of this process, from Linux' /proc or the POSIX resource module."""
    used = peak = total = None
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            fields = dict(line.split(":", 1) for line in status if ":" in line)
        used = int(fields["VmRSS"].split()[0]) * 1024
        peak = int(fields["VmHWM"].split()[0]) * 1024
        with open("/proc/meminfo", encoding="ascii") as info:
            total = int(info.readline().split()[1]) * 1024
    except (OSError, KeyError, ValueError):
        peak = _peak_by_resource()
    return MemoryStats(used, peak, total)


def _peak_by_resource() -> int | None:
    """Peak resident set by `getrusage` (macOS counts bytes, the other systems KiB); None on Windows."""
    import sys

    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
