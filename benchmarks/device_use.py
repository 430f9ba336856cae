"""How well a step uses a device: arithmetic it can do at most, and the time in which it computes at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks.models import compare
from library.runtime.devices import synchronize


def matrix_peak(device: torch.device, size: int = 8192, rounds: int = 20) -> float:
    """Operations per second that a large bfloat16 matrix product reaches here."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = compare({"product": lambda: a @ b}, rounds=rounds, device=str(device))["product"]
    return 2 * size**3 / seconds


def busy_seconds(step: Callable[[], None], device: torch.device, rounds: int) -> float | None:
    """Seconds of a step in which some kernel or copy runs, by torch's profiler; None where it does not see them."""
    kind = device.type.upper()
    activity = getattr(torch.profiler.ProfilerActivity, kind, None)
    if device.type == "cpu" or activity not in torch.profiler.supported_activities():
        return None
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(rounds):
            step()
        synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == kind and not getattr(event, "is_user_annotation", False)
    ]
    return covered(spans) / 1e6 / rounds if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what (start, end) spans cover together; where they overlap it counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
