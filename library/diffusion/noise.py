"""The noise of a training step and the noised latents: plain, offset, pyramid, perturbed. Always float32."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from library.diffusion.schedule import NoiseSchedule
    from library.options.objective import ObjectiveConfig


def draw_noise(
    latents: torch.Tensor,
    config: ObjectiveConfig,
    generator: torch.Generator | None = None,
    python_rng: random.Random | None = None,
) -> torch.Tensor:
    """Noise for a batch; it is also the target of a model that predicts noise.

    Args:
        latents: (B, C, h, w), scaled.
        config: `noise_offset`, `adaptive_noise_scale`, `multires_noise_*`.
        generator: draws the tensors; None = torch's global one.
        python_rng: draws the pyramid's scales; None = Python's global one.

    Returns:
        float32 (B, C, h, w) on the device of the latents.
    """
    noise = randn(latents.shape, latents.device, generator)
    if config.noise_offset:
        strength = config.noise_offset
        if config.noise_offset_random_strength:
            strength = strength * rand(latents.device, generator)
        noise = add_offset(noise, latents, strength, config.adaptive_noise_scale, generator)
    if config.multires_noise_iterations:
        rng = python_rng or random
        noise = add_pyramid(
            noise, config.multires_noise_iterations, config.multires_noise_discount, generator, rng.random
        )
    return noise


def noisy_input(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseSchedule,
    config: ObjectiveConfig,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """What the U-Net sees: x_t from latents and noise (B, C, h, w), with `ip_noise_gamma` from perturbed noise.

    The perturbation (Ning et al. 2023) enters here only, never the target.
    """
    if config.ip_noise_gamma:
        noise = perturb(noise, config, generator)
    return schedule.add_noise(latents.float(), noise, timesteps)


def perturb(noise: torch.Tensor, config: ObjectiveConfig, generator: torch.Generator | None) -> torch.Tensor:
    """Noise (B, C, h, w) with more noise of strength `ip_noise_gamma`."""
    gamma = config.ip_noise_gamma
    if config.ip_noise_gamma_random_strength:
        gamma = gamma * rand(noise.device, generator)
    return noise + gamma * randn(noise.shape, noise.device, generator)


def add_offset(
    noise: torch.Tensor,
    latents: torch.Tensor,
    offset: float | torch.Tensor,
    adaptive_scale: float | None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Add one random constant per picture and channel, so that the model learns overall brightness.

    Args:
        noise, latents: (B, C, h, w).
        offset: strength.
        adaptive_scale: times the channel's absolute mean is added to the strength, which stays at least 0.
    """
    if adaptive_scale:
        mean = latents.float().mean(dim=(2, 3), keepdim=True).abs()
        offset = (offset + adaptive_scale * mean).clamp(min=0)
    return noise + offset * randn((*noise.shape[:2], 1, 1), noise.device, generator)


def add_pyramid(
    noise: torch.Tensor, levels: int, discount: float, generator: torch.Generator | None, uniform=random.random
) -> torch.Tensor:
    """Add noise of ever coarser resolution and bring the batch back to a standard deviation of 1.

    Args:
        noise: (B, C, h, w).
        levels: at most so many; ends when a side has become 1.
        discount: weight of each level relative to the one before.
        uniform: draws from [0, 1) the ratio between resolutions, 2 to 4, anew for each level.
    """
    batch, channels, height, width = noise.shape
    for level in range(levels):
        ratio = (2 + 2 * uniform()) ** level
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = randn((batch, channels, *size), noise.device, generator)
        noise = noise + discount**level * F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        if 1 in size:
            break
    return noise / noise.std()


def randn(shape, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """Standard normal float32 numbers, drawn where the generator lives and moved to `device`."""
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device, non_blocking=True)


def rand(device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """One float32 number from [0, 1), shape (), on `device`."""
    source = generator.device if generator is not None else device
    return torch.rand((), generator=generator, device=source).to(device, non_blocking=True)
