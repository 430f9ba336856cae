"""What micro-steps left on the device, fetched in one read: their losses, gradient norms, and losses by timestep.

Losses depend so strongly on the timestep that their mean says little about a few steps; by band they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.diffusion.schedule import TIMESTEPS

if TYPE_CHECKING:
    from library.runtime.processes import Processes
    from library.training.logbook import Entry

BANDS = 5


@dataclass(frozen=True, slots=True)
class Fetched:
    """One micro-step in numbers.

    Attributes:
        loss: its mean loss over all processes.
        norm: of the gradients of its update, None where it made none.
        bands: (sum of losses, number of samples) of each band of timesteps, over all processes.
    """

    loss: float
    norm: float | None
    bands: list[tuple[float, float]]


def band_names() -> list[str]:
    """The bands as texts: `0-199`, `200-399`, ..."""
    width = TIMESTEPS // BANDS
    return [f"{low}-{low + width - 1}" for low in range(0, TIMESTEPS, width)]


def fetch(entries: Sequence[Entry], processes: Processes) -> list[Fetched]:
    """Everything the entries hold as tensors, averaged over processes, by one copy to the host."""
    count = len(entries)
    losses = torch.stack([entry.loss.float() for entry in entries])
    measured = [entry.norm is not None for entry in entries]
    norms = [entry.norm.float().reshape(()) for entry in entries if entry.norm is not None]
    parts = [losses, *([torch.stack(norms).to(losses.device)] if norms else []), _by_band(entries, losses.device)]
    values = processes.reduce_mean(torch.cat(parts)).tolist()
    left = iter(values[count:])
    own_norms = [next(left) if there else None for there in measured]
    # the mean over processes of a sum and of a count: their ratio is that of the totals
    table = [value * processes.count for value in left]
    sums, counts = table[: count * BANDS], table[count * BANDS :]
    bands: list[Any] = list(zip(sums, counts, strict=True))
    rows = [bands[at * BANDS : (at + 1) * BANDS] for at in range(count)]
    return [Fetched(*row) for row in zip(values[:count], own_norms, rows, strict=True)]


def _by_band(entries: Sequence[Entry], device: torch.device) -> torch.Tensor:
    """Sums of losses, then numbers of samples, of each entry's bands: float32 (2 * entries * bands)."""
    table = torch.zeros(2, len(entries) * BANDS, device=device)
    known = [(number, *entry.samples) for number, entry in enumerate(entries) if entry.samples is not None]
    if known:
        offsets = torch.tensor([n * BANDS for n, _, timesteps in known for _ in range(len(timesteps))], device=device)
        timesteps = torch.cat([timesteps.to(device) for _, _, timesteps in known])
        losses = torch.cat([losses.to(device).float() for _, losses, _ in known])
        slots = offsets + timesteps.long() * BANDS // TIMESTEPS
        table.index_add_(1, slots, torch.stack([losses, torch.ones_like(losses)]))
    return table.flatten()
