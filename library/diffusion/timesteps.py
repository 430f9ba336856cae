"""Which timesteps a training step looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from library.diffusion.schedule import TIMESTEPS

if TYPE_CHECKING:
    from library.options.objective import ObjectiveConfig


def timestep_range(config: ObjectiveConfig) -> tuple[int, int]:
    """First timestep and the one after the last: `--min_timestep`, `--max_timestep` or the whole schedule."""
    low = 0 if config.min_timestep is None else config.min_timestep
    high = TIMESTEPS if config.max_timestep is None else config.max_timestep
    return low, high


def draw_timesteps(
    count: int,
    config: ObjectiveConfig,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """int64 (count,) timesteps, uniform over the range that the options allow."""
    low, high = timestep_range(config)
    source = generator.device if generator is not None else device
    return torch.randint(low, high, (count,), generator=generator, device=source).to(device, non_blocking=True)


def validation_timesteps(config: ObjectiveConfig) -> list[int]:
    """The four timesteps validation looks at: evenly spaced over the range, without its ends."""
    low, high = timestep_range(config)
    return [int(value) for value in torch.linspace(low, high, 6)[1:-1]]
