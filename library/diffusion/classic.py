"""Objective functions as other programs call them: with a diffusers scheduler and a script's namespace.

The scheduler's own tables count (`alphas_cumprod`, `all_snr`), so a scheduler that was rescaled stays so. Draws
come from the global generators. Nothing inside uses these.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from library.diffusion import noise, objective
from library.diffusion.noise import add_offset, add_pyramid
from library.diffusion.samplers import make_sampler
from library.diffusion.schedule import NoiseSchedule, snr_of, zero_terminal_betas
from library.diffusion.timesteps import draw_timesteps
from library.options.declare import from_namespace
from library.options.objective import ObjectiveConfig

REDUCTIONS = ("mean", "sum", "none")


def prepare_scheduler_for_custom_training(noise_scheduler: Any, device: Any) -> None:
    """Give the scheduler the signal-to-noise ratio of every timestep as `all_snr`, once."""
    if not hasattr(noise_scheduler, "all_snr"):
        noise_scheduler.all_snr = snr_of(noise_scheduler.alphas_cumprod).to(device)


def fix_noise_scheduler_betas_for_zero_terminal_snr(noise_scheduler: Any) -> None:
    """Rescale the scheduler's tables so that the last timestep is pure noise; `all_snr` stays as it is."""
    betas = zero_terminal_betas(noise_scheduler.alphas_cumprod)
    noise_scheduler.betas = betas
    noise_scheduler.alphas = 1 - betas
    noise_scheduler.alphas_cumprod = torch.cumprod(noise_scheduler.alphas, dim=0)


def apply_snr_weight(
    loss: torch.Tensor, timesteps: torch.Tensor, noise_scheduler: Any, gamma: float, v_prediction: bool = False
) -> torch.Tensor:
    """Losses (B) times their min-SNR weights."""
    return loss * objective.min_snr_weight(_snr(timesteps, noise_scheduler), gamma, v_prediction)


def get_snr_scale(timesteps: torch.Tensor, noise_scheduler: Any) -> torch.Tensor:
    """snr / (snr + 1) of each timestep."""
    return objective.noise_like_weight(_snr(timesteps, noise_scheduler))


def scale_v_prediction_loss_like_noise_prediction(
    loss: torch.Tensor, timesteps: torch.Tensor, noise_scheduler: Any
) -> torch.Tensor:
    """Velocity losses (B) weighted like noise losses."""
    return loss * get_snr_scale(timesteps, noise_scheduler)


def add_v_prediction_like_loss(
    loss: torch.Tensor, timesteps: torch.Tensor, noise_scheduler: Any, v_pred_like_loss: float
) -> torch.Tensor:
    """Noise losses (B) with the weights of a velocity loss added."""
    return loss * objective.v_like_weight(_snr(timesteps, noise_scheduler), v_pred_like_loss)


def apply_debiased_estimation(
    loss: torch.Tensor, timesteps: torch.Tensor, noise_scheduler: Any, v_prediction: bool = False
) -> torch.Tensor:
    """Losses (B) times the debiased weights."""
    return loss * objective.debiased_weight(_snr(timesteps, noise_scheduler), v_prediction)


def apply_masked_loss(loss: torch.Tensor, batch: Any) -> torch.Tensor:
    """Element losses (B, C, h, w) times the mask of the batch: conditioning images first, else alpha masks."""
    if batch.get("conditioning_images") is not None:
        mask = batch["conditioning_images"][:, :1] / 2 + 0.5
    elif batch.get("alpha_masks") is not None:
        mask = batch["alpha_masks"].unsqueeze(1)
    else:
        return loss
    return loss * F.interpolate(mask.to(loss), loss.shape[-2:], mode="area")


def pyramid_noise_like(noise: torch.Tensor, device: Any, iterations: int = 6, discount: float = 0.4) -> torch.Tensor:
    """Noise (B, C, h, w) with coarser levels added."""
    return add_pyramid(noise, iterations, discount, None)


def apply_noise_offset(
    latents: torch.Tensor, noise: torch.Tensor, noise_offset: float | None, adaptive_noise_scale: float | None
) -> torch.Tensor:
    """Noise with a random constant per picture and channel."""
    return noise if noise_offset is None else add_offset(noise, latents, noise_offset, adaptive_noise_scale)


def get_noise_noisy_latents_and_timesteps(
    args: Any, noise_scheduler: Any, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noise, noised latents, timesteps) of a training step, in the latents' format."""
    config = from_namespace(ObjectiveConfig, args)
    drawn = noise.draw_noise(latents, config)
    timesteps = draw_timesteps(latents.shape[0], config, None, latents.device)
    schedule = _schedule(noise_scheduler, latents.device)
    noisy = noise.noisy_input(latents, drawn, timesteps, schedule, config)
    return drawn.to(latents.dtype), noisy.to(latents.dtype), timesteps


def get_timesteps(min_timestep: int, max_timestep: int, b_size: int, device: Any) -> torch.Tensor:
    """int64 (b_size) timesteps from [min, max); all equal max when that range is empty."""
    if min_timestep >= max_timestep:
        return torch.full((b_size,), max_timestep, dtype=torch.int64, device=device)
    config = ObjectiveConfig(min_timestep=min_timestep, max_timestep=max_timestep)
    return draw_timesteps(b_size, config, None, device)


def get_huber_threshold_if_needed(args: Any, timesteps: torch.Tensor, noise_scheduler: Any) -> torch.Tensor | None:
    """Threshold (B) of the Huber losses, None for the others."""
    config = from_namespace(ObjectiveConfig, args)
    if config.loss_type not in objective.HUBER_LOSSES:
        return None
    return objective.huber_threshold(timesteps, _schedule(noise_scheduler, timesteps.device), config)


def conditional_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    first: str = "mean",
    second: str = "l2",
    huber_c: torch.Tensor | float | None = None,
    **named: str,
) -> torch.Tensor:
    """Loss by type and reduction.

    Args:
        first, second: loss type and reduction in either order, which changed between releases.
        huber_c: threshold of the Huber losses, a number or (B).
        named: `loss_type`, `reduction`.
    """
    texts = [*named.values(), first, second]
    reduction = named.get("reduction") or next((text for text in texts if text in REDUCTIONS), "mean")
    loss_type = named.get("loss_type") or next((text for text in texts if text not in REDUCTIONS), "l2")
    error = model_pred - target
    if loss_type == "l2":
        loss = error**2
    elif loss_type == "l1":
        loss = error.abs()
    else:
        c = torch.as_tensor(0.1 if huber_c is None else huber_c, device=error.device)
        loss = objective.pseudo_huber(error, c.reshape(-1, *[1] * (error.ndim - 1)), loss_type)
    return loss if reduction == "none" else getattr(loss, reduction)()


def get_my_scheduler(*, sample_sampler: str, v_parameterization: bool) -> Any:
    """The sampler of sample pictures."""
    return make_sampler(sample_sampler, v_prediction=v_parameterization)


def _snr(timesteps: torch.Tensor, noise_scheduler: Any) -> torch.Tensor:
    return noise_scheduler.all_snr[timesteps.to(noise_scheduler.all_snr.device)].to(timesteps.device)


def _schedule(noise_scheduler: Any, device: Any) -> NoiseSchedule:
    abar = noise_scheduler.alphas_cumprod
    snr = noise_scheduler.all_snr if hasattr(noise_scheduler, "all_snr") else snr_of(abar)
    return NoiseSchedule(noise_scheduler.betas, abar, snr).to(device)
