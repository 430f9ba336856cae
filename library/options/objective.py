"""Noise, timesteps, loss and its weights."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Noise, timesteps, loss and its weights."""

    noise_offset: float | None = option(None, "")
    noise_offset_random_strength: bool = option(False, "")
    adaptive_noise_scale: float | None = option(None, "")
    multires_noise_iterations: int | None = option(None, "")
    multires_noise_discount: float = option(0.3, "")
    ip_noise_gamma: float | None = option(None, "")
    ip_noise_gamma_random_strength: bool = option(False, "")
    zero_terminal_snr: bool = option(False, "")
    min_timestep: int | None = option(None, "")
    max_timestep: int | None = option(None, "")
    min_snr_gamma: float | None = option(None, "")
    scale_v_pred_loss_like_noise_pred: bool = option(False, "")
    v_pred_like_loss: float | None = option(None, "")
    debiased_estimation_loss: bool = option(False, "")
    loss_type: str = option("l2", "", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = option("snr", "", choices=("constant", "exponential", "snr"))
    huber_c: float = option(0.1, "")
    huber_scale: float = option(1.0, "")
    masked_loss: bool = option(False, "")
