"""Noise, timesteps, loss and its weights."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Noise, timesteps, loss and its weights."""

    noise_offset: float | None = option(
        None, "add noise that is constant over a channel, of this strength (about 0.05 to 0.15; 0 = off)"
    )
    noise_offset_random_strength: bool = option(
        False, "draw the strength of the noise offset between 0 and --noise_offset for each batch"
    )
    adaptive_noise_scale: float | None = option(
        None, "add this times the latents' absolute channel means to the noise offset; needs --noise_offset"
    )
    multires_noise_iterations: int | None = option(
        None, "add noise of this many coarser resolutions (6 to 10; 0 = off)"
    )
    multires_noise_discount: float = option(0.3, "factor of each coarser resolution of the multi-resolution noise")
    ip_noise_gamma: float | None = option(
        None, "strength of noise added to the U-Net's input only (about 0.1; 0 = off)"
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "draw the strength of the input noise between 0 and --ip_noise_gamma for each batch"
    )
    zero_terminal_snr: bool = option(
        False, "rescale the noise schedule so that its end is pure noise; for v-prediction"
    )
    min_timestep: int | None = option(None, "smallest timestep that is drawn, from 0")
    max_timestep: int | None = option(None, "end of the timesteps that are drawn, at most 1000, itself left out")
    min_snr_gamma: float | None = option(None, "limit of the signal-to-noise weight of the loss (5 is usual; 0 = off)")
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "scale the velocity loss to the size of the noise loss; needs --v_parameterization"
    )
    v_pred_like_loss: float | None = option(
        None, "factor of a velocity-like term added to the noise loss; not with --v_parameterization"
    )
    debiased_estimation_loss: bool = option(False, "weigh the loss by 1 / sqrt(signal-to-noise ratio)")
    loss_type: str = option(
        "l2", "loss of one value: l1, l2, huber or smooth_l1", choices=("l1", "l2", "huber", "smooth_l1")
    )
    huber_schedule: str = option(
        "snr",
        "how the threshold of huber and smooth_l1 depends on the timestep",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(0.1, "threshold of huber and smooth_l1 at the noisy end of the schedule")
    huber_scale: float = option(1.0, "factor of the threshold of huber and smooth_l1")
    masked_loss: bool = option(
        False, "weigh the loss by mask pictures from --conditioning_data_dir, or from that key of the data-set file"
    )
