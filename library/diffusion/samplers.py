"""Samplers by name: diffusers' schedulers with the settings under which they give this project's pictures.

Tables stay on the CPU, so that a step reads no number back from a device. Settings: the defaults of diffusers
0.21 for the common training schedule, clipping of the predicted latents off, offset 1 where a class has one.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from library.messages import UserError, warn_once
from library.options.registries import SAMPLER_NAMES, SAMPLERS, SamplerRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

# Known to the set-up though no option offers it.
_DDPM = SamplerRecord(name="ddpm", scheduler="DDPMScheduler", note="ancestral sampling", noise_draws=1)


def sampler_info(name: str) -> SamplerRecord:
    """The record of a sampler, aliases (`k_euler`, ...) included.

    Raises:
        UserError: no sampler has this name.
    """
    for record in (*SAMPLERS, _DDPM):
        if name in (record.name, *record.aliases):
            return record
    raise UserError(f"unknown sampler {name!r}", f"choose one of {', '.join(SAMPLER_NAMES)}")


def make_sampler(name: str, *, v_prediction: bool = False, zero_terminal_snr: bool = False) -> Any:
    """Build a sampler (a diffusers scheduler) by name.

    Args:
        name: `ddim`, `euler_a`, ... or an alias.
        v_prediction: the model predicts velocity instead of noise.
        zero_terminal_snr: the model was trained on a schedule that ends in pure noise.
    """
    import diffusers

    from library.diffusion.schedule import BETA_END, BETA_SCHEDULE, BETA_START, TIMESTEPS

    info = sampler_info(name)
    scheduler_class = getattr(diffusers, info.scheduler)
    known = inspect.signature(scheduler_class.__init__).parameters
    settings = {
        "num_train_timesteps": TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": BETA_SCHEDULE,
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
        "steps_offset": 1,
        "clip_sample": False,
        "rescale_betas_zero_snr": zero_terminal_snr,
        **info.settings,
    }
    if zero_terminal_snr and "rescale_betas_zero_snr" not in known:
        warn_once(f"sampler {name} knows no zero terminal SNR: ddim, euler, euler_a or dpmsolver++ suit this model")
    return scheduler_class(**{key: value for key, value in settings.items() if key in known})


def set_steps(sampler: Any, steps: int) -> None:
    """Lay out `steps` sampler steps; afterwards `sampler.timesteps` holds what the U-Net is called with.

    Raises:
        UserError: this sampler cannot make so few steps.
    """
    kind = type(sampler).__name__
    least = 4 if kind == "PNDMScheduler" else 1
    if steps < least:
        raise UserError(f"{steps} sampler steps are too few", f"use at least {least} or another sampler")
    sampler.set_timesteps(steps, device="cpu")
    if kind == "DPMSolverSinglestepScheduler" and steps % 2 == 0:
        # Newer diffusers ends an even count with two first-order steps; every pair is of order 1, 2 here.
        sampler.order_list = [1, 2] * (steps // 2)


def sampler_step(
    sampler: Any,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """One sampler step.

    Args:
        sampler: from `make_sampler`, after `set_steps`.
        model_output: (B, C, h, w) prediction of the model, guidance applied.
        timestep: the entry of `sampler.timesteps` that this step is for.
        sample: (B, C, h, w) latents before the step.
        generators: one per picture, so that a picture does not depend on its batch mates.

    Returns:
        (B, C, h, w) latents after the step.
    """
    kwargs: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(sampler.step).parameters:
        kwargs["generator"] = list(generators)
    if type(sampler).__name__ == "KDPM2AncestralDiscreteScheduler" and sampler.state_in_first_order:
        _discard_draw(sample, generators)
    return sampler.step(model_output, timestep, sample, **kwargs)[0]


def _discard_draw(sample: torch.Tensor, generators: Sequence[torch.Generator]) -> None:
    """Draw and drop one noise per picture: pictures of dpm_2_a count a draw in first-order calls too."""
    import torch

    for generator in generators:
        torch.randn(sample.shape[1:], generator=generator, device=generator.device, dtype=sample.dtype)
