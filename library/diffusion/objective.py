"""What the model should predict, how its error is measured, and how much each picture's error weighs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from library.diffusion.schedule import TIMESTEPS
from library.replaceable import replacement

if TYPE_CHECKING:
    from library.diffusion.schedule import NoiseSchedule
    from library.options.objective import ObjectiveConfig

MAX_SNR = 1000.0
HUBER_LOSSES = ("huber", "smooth_l1")


def target(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseSchedule,
    v_prediction: bool,
) -> torch.Tensor:
    """The noise, or the velocity of latents and noise (B, C, h, w) at timesteps (B,)."""
    return schedule.velocity(latents.float(), noise, timesteps) if v_prediction else noise


def loss_per_sample(
    prediction: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseSchedule,
    config: ObjectiveConfig,
    *,
    v_prediction: bool,
    loss_weights: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted loss of each picture; the batch's loss is its mean.

    Args:
        prediction, target: (B, C, h, w).
        timesteps: int64 (B,).
        schedule: on the same device.
        config: loss and weights.
        v_prediction: the model predicts velocity.
        loss_weights: (B,) or (), weight of each picture (regularisation pictures).
        mask: (B, 1, H, W) in [0, 1] at any size; 0 leaves a place out.

    Returns:
        float32 (B,).
    """
    loss = element_loss(prediction.float(), target.float(), timesteps, schedule, config)
    if mask is not None:
        loss = loss * F.interpolate(mask.float(), loss.shape[-2:], mode="area")
    loss = loss.mean(dim=(1, 2, 3)) * loss_weights
    snr = schedule.snr[timesteps]
    if config.min_snr_gamma:
        loss = loss * min_snr_weight(snr, config.min_snr_gamma, v_prediction)
    if config.scale_v_pred_loss_like_noise_pred:
        loss = loss * noise_like_weight(snr)
    if config.v_pred_like_loss:
        loss = loss * v_like_weight(snr, config.v_pred_like_loss)
    if config.debiased_estimation_loss:
        loss = loss * debiased_weight(snr, v_prediction)
    return loss


def element_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: NoiseSchedule,
    config: ObjectiveConfig,
) -> torch.Tensor:
    """Error of each element by `--loss_type`, float32 (B, C, h, w)."""
    foreign = replacement("train_util", "conditional_loss")
    if foreign is not None:
        c = huber_threshold(timesteps, schedule, config) if config.loss_type in HUBER_LOSSES else None
        return foreign(prediction, target, loss_type=config.loss_type, reduction="none", huber_c=c)
    error = prediction - target
    if config.loss_type == "l2":
        return error**2
    if config.loss_type == "l1":
        return error.abs()
    c = huber_threshold(timesteps, schedule, config).reshape(-1, 1, 1, 1)
    return pseudo_huber(error, c, config.loss_type)


def pseudo_huber(error: torch.Tensor, c: torch.Tensor | float, loss_type: str) -> torch.Tensor:
    """2 (sqrt(d^2 + c^2) - c) for `smooth_l1`, c times that for `huber`: quadratic below c, linear above."""
    smooth = 2 * ((error**2 + c**2).sqrt() - c)
    return c * smooth if loss_type == "huber" else smooth


def huber_threshold(timesteps: torch.Tensor, schedule: NoiseSchedule, config: ObjectiveConfig) -> torch.Tensor:
    """c_t (B,) of the Huber losses: constant, or falling to `huber_c` as noise grows (by time or by SNR)."""
    if config.huber_schedule == "exponential":
        c = torch.exp(timesteps * (math.log(config.huber_c) / TIMESTEPS))
    elif config.huber_schedule == "snr":
        signal, noise = schedule.signal_and_noise(timesteps)
        c = (1 - config.huber_c) / (1 + (noise / signal).flatten()) ** 2 + config.huber_c
    else:
        c = torch.full(timesteps.shape, config.huber_c, device=timesteps.device)
    return c * config.huber_scale


def min_snr_weight(snr: torch.Tensor, gamma: float, v_prediction: bool) -> torch.Tensor:
    """min(gamma, snr) / snr, for velocity / (snr + 1) (Hang et al. 2023)."""
    return snr.clamp(max=gamma) / (snr + 1 if v_prediction else snr)


def noise_like_weight(snr: torch.Tensor) -> torch.Tensor:
    """snr / (snr + 1): gives a velocity loss the weights of a noise loss."""
    snr = snr.clamp(max=MAX_SNR)
    return snr / (snr + 1)


def v_like_weight(snr: torch.Tensor, strength: float) -> torch.Tensor:
    """1 + strength (snr + 1) / snr: adds the weights of a velocity loss to a noise loss."""
    return 1 + strength / noise_like_weight(snr)


def debiased_weight(snr: torch.Tensor, v_prediction: bool) -> torch.Tensor:
    """1 / sqrt(snr), for velocity 1 / (snr + 1) (Yu et al. 2023)."""
    snr = snr.clamp(max=MAX_SNR)
    return 1 / (snr + 1) if v_prediction else snr.rsqrt()
