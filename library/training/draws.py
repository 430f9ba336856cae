"""What a micro-step draws at random, each draw from a stream named by its purpose and place.

The replay of recorded runs hands the loop a subclass that returns recorded draws instead.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.diffusion import noise, timesteps
from library.runtime.streams import python_stream, stream, stream_seed

if TYPE_CHECKING:
    from library.diffusion.schedule import NoiseSchedule
    from library.options.objective import ObjectiveConfig


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the run a micro-step stands.

    Attributes:
        epoch: 1-based.
        micro: micro-step within the epoch on this process, from 0.
        batch: number of the batch within the epoch over all processes, from 0.
        rank, processes: this process, and how many work on the micro-step together.
        samples: of this process in the micro-step; 0 where the plan does not say.
        together: samples of all processes in it.
    """

    epoch: int
    micro: int
    batch: int
    rank: int = 0
    processes: int = 1
    samples: int = 0
    together: int = 0

    @property
    def loss_weight(self) -> float:
        """Of this process's mean loss, so that the mean over processes is the mean over samples."""
        return self.samples * self.processes / self.together if self.together else 1.0

    def rows(self, count: int) -> tuple[int, slice]:
        """How many samples all processes draw for, and which of them are this process's `count`.

        Each process draws for all and takes its own rows, so that two processes see the noise that one would
        with twice the batch.
        """
        total = self.together if count == self.samples else count * self.processes
        return total, slice(self.rank, None, self.processes)


class Draws:
    """Random draws of the training step; a function of (seed, place) alone.

    Args:
        seed: the run's seed.
        device: where noise is drawn.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device

    def generator(self, name: str, place: Place) -> torch.Generator:
        """The generator for one purpose at one place, on the training device."""
        # MPS generators differ between releases; the CPU's are stable and the draws are small
        device = "cpu" if self.device.type == "mps" else str(self.device)
        return stream(self.seed, name, place.epoch, place.micro, device)

    def seed_modules(self, place: Place) -> None:
        """Seed the global generators, from which foreign modules (dropout, DyLoRA) draw."""
        value = stream_seed(self.seed, "modules", place.epoch, place.batch)
        random.seed(value)
        torch.manual_seed(value)

    def seed_creation(self) -> None:
        """Seed the global generators before a network draws its starting weights."""
        value = stream_seed(self.seed, "creation")
        random.seed(value)
        torch.manual_seed(value)

    def posterior(self, place: Place, distribution: Any) -> torch.Tensor:
        """A sample of the VAE's posterior, (B, 4, h, w)."""
        generator = self.generator("vae", place)
        if place.processes == 1:
            return distribution.sample(generator)
        mean = distribution.mean
        total, own = place.rows(len(mean))
        drawn = noise.randn((total, *mean.shape[1:]), mean.device, generator)[own]
        return mean + distribution.std * drawn.to(mean.dtype)

    def cached_posterior(self, distribution: Any, images: torch.Tensor) -> torch.Tensor:
        """One sample per picture for the latent cache, each a function of seed and picture (B, 3, H, W)."""
        shape = distribution.mean.shape[1:]
        # every eighth pixel tells pictures apart well enough, and a hash of all of them would cost more than the VAE
        keys = [zlib.crc32(image[:, ::8, ::8].contiguous().numpy()) for image in images.cpu()]
        rows = [torch.randn(shape, generator=stream(self.seed, "latent cache", item=key)) for key in keys]
        return distribution.mean + distribution.std * torch.stack(rows).to(distribution.mean)

    def noise(self, place: Place, latents: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
        """Noise of the latents' shape, offset and pyramid noise included."""
        rng = python_stream(self.seed, "noise", place.epoch, place.micro)
        everyones, own = everyones_rows(place, latents)
        return noise.draw_noise(everyones, config, self.generator("noise", place), rng)[own]

    def timesteps(self, place: Place, count: int, config: ObjectiveConfig) -> torch.Tensor:
        """int64 (B,) timesteps."""
        total, own = place.rows(count)
        return timesteps.draw_timesteps(total, config, self.generator("timestep", place), self.device)[own]

    def noisy_input(
        self,
        place: Place,
        latents: torch.Tensor,
        noise_: torch.Tensor,
        timesteps_: torch.Tensor,
        schedule: NoiseSchedule,
        config: ObjectiveConfig,
    ) -> torch.Tensor:
        """The noised latents that the U-Net sees, input perturbation included."""
        if config.ip_noise_gamma:
            everyones, own = everyones_rows(place, noise_)
            noise_ = noise.perturb(everyones, config, self.generator("perturbation", place))[own]
        return schedule.add_noise(latents.float(), noise_, timesteps_)


def everyones_rows(place: Place, own: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """A tensor with the rows of all processes, zero where they are not this process's, and the slice that are."""
    if place.processes == 1:
        return own, slice(None)
    total, rows = place.rows(len(own))
    full = own.new_zeros((total, *own.shape[1:]))
    full[rows] = own
    return full, rows
