"""The noise schedule of Stable Diffusion: how much signal and noise a latent holds at each timestep."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012
BETA_SCHEDULE = "scaled_linear"


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """Tables over the timesteps, float32 (T,).

    Attributes:
        betas: noise added at each step.
        alphas_cumprod: share of the signal's variance that is left, abar_t.
        snr: signal-to-noise ratio abar_t / (1 - abar_t) of the ordinary schedule; loss weights use it also when
            the schedule was rescaled to zero terminal SNR, where the ratio would be 0.
    """

    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    snr: torch.Tensor

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on `device`."""
        return NoiseSchedule(*(getattr(self, field.name).to(device) for field in fields(self)))

    def signal_and_noise(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) for timesteps (B,), each (B, 1, 1, 1)."""
        abar = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) e for latents and noise (B, C, h, w)."""
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * latents + sigma * noise

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = sqrt(abar_t) e - sqrt(1 - abar_t) x0 for latents and noise (B, C, h, w)."""
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * noise - sigma * latents


def make_schedule(*, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """The schedule SD and SDXL were trained with: sqrt(beta) linear from 0.00085 to 0.012 over 1000 steps.

    Args:
        zero_terminal_snr: rescale so that the last timestep is pure noise (Lin et al. 2023, algorithm 1).
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float32) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    snr = snr_of(alphas_cumprod)
    if zero_terminal_snr:
        betas = zero_terminal_betas(alphas_cumprod)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return NoiseSchedule(betas, alphas_cumprod, snr)


def snr_of(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio per timestep, float32 (T,)."""
    return (alphas_cumprod.sqrt() / (1 - alphas_cumprod).sqrt()) ** 2


def zero_terminal_betas(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Betas (T,) of the schedule shifted and scaled so that the first step stays and the last has no signal."""
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    abar = ((root - last) * first / (first - last)) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
