"""From noise to latents: each picture's own random stream, guidance, and the loop over the sampler's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.diffusion.samplers import sampler_info, sampler_step
from library.messages import UserError

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(model input (r B, 4, h, w), timesteps (r B,)) -> the model's output of the same shape, r = `Guidance.parts`."""

OnStep = Callable[[int, torch.Tensor, torch.Tensor], Any]
"""(index of the model call, timestep, latents after it); a true result stops the picture."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: with the negative prompt, and optionally with the empty one as the base.

    Attributes:
        scale: 1 or less switches guidance off.
        negative_scale: how far the negative prompt pushes away from the empty prompt, or None.
    """

    scale: float
    negative_scale: float | None = None

    @property
    def parts(self) -> int:
        """Rows per picture in a model call: 1 (prompt), 2 (negative, prompt) or 3 (negative, prompt, empty)."""
        if self.scale <= 1.0:
            return 1
        return 2 if self.negative_scale is None else 3

    def combine(self, output: torch.Tensor) -> torch.Tensor:
        """Model output (r B, 4, h, w) in the order negative, prompt, empty -> guided output (B, 4, h, w)."""
        if self.parts == 1:
            return output
        if self.parts == 2:
            negative, positive = output.chunk(2)
            return negative + self.scale * (positive - negative)
        negative, positive, empty = output.chunk(3)
        return empty + self.scale * (positive - empty) - self.negative_scale * (negative - empty)


def picture_generators(seeds: Sequence[int], device: str | torch.device) -> list[torch.Generator]:
    """One generator per picture, seeded with the picture's own seed.

    Raises:
        UserError: a seed beyond 64 bits.
    """
    generators = []
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise UserError(f"seed {seed} is too large", "use a seed below 2^64")
        generators.append(torch.Generator(device).manual_seed(seed))
    return generators


def start_noise(
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    sampler: str,
    steps: int,
) -> torch.Tensor:
    """Start latents (B, 4, h, w) of unit variance; afterwards each generator stands where sampler noise begins.

    Between the start latent and the sampler's noise the pictures of this toolkit skip one draw per step (dpm_2_a:
    two), so the skipped draws are made and dropped.
    """
    draws = sampler_info(sampler).noise_draws
    latents = []
    for generator in generators:
        latents.append(torch.randn(shape, generator=generator, device=generator.device, dtype=dtype))
        for _ in range(draws * steps):
            torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return torch.stack(latents)


def denoise(
    predict: Predict,
    sampler: Any,
    latents: torch.Tensor,
    guidance: Guidance,
    generators: Sequence[torch.Generator],
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Run a sampler over all its timesteps.

    Args:
        predict: one model call for all rows.
        sampler: from `make_sampler`, after `set_steps`.
        latents: (B, 4, h, w) start latents, multiplied by the sampler's start sigma.
        generators: one per picture, for samplers that draw noise.
        on_step: told about each call; may stop the loop.

    Returns:
        (B, 4, h, w) latents in the model's scale.
    """
    # One copy for all steps, in a format that every device knows.
    timesteps = sampler.timesteps
    on_device = (timesteps.float() if timesteps.is_floating_point() else timesteps).to(latents.device)
    rows = guidance.parts * latents.shape[0]
    for index, timestep in enumerate(timesteps):
        model_input = sampler.scale_model_input(latents, timestep)
        output = predict(torch.cat([model_input] * guidance.parts), on_device[index].expand(rows))
        latents = sampler_step(sampler, guidance.combine(output), timestep, latents, generators)
        if on_step is not None and on_step(index, timestep, latents):
            break
    return latents
