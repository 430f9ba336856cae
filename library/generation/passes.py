"""The passes that make latents. Text to image: from noise alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from library.diffusion.samplers import make_sampler, set_steps
from library.generation.denoise import Guidance, OnStep, Predict, denoise, picture_generators, start_noise
from library.generation.request import ImageRequest

LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8


def text_to_image(
    predict: Predict,
    requests: Sequence[ImageRequest],
    *,
    sampler_name: str,
    v_prediction: bool,
    device: str | torch.device,
    dtype: torch.dtype,
    zero_terminal_snr: bool = False,
    noise_device: str | torch.device | None = None,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Draw a batch from noise.

    Args:
        predict: the model with the batch's text, rows in the order of `Guidance`.
        requests: B requests of equal size, steps and guidance.
        dtype: of noise and latents; another one gives other pictures for the same seed.
        zero_terminal_snr: the model was trained with it.
        noise_device: where noise is drawn, in float32 then; None for `device` and `dtype`.

    Returns:
        (B, 4, H/8, W/8) latents in the model's scale.
    """
    first = requests[0]
    sampler = make_sampler(sampler_name, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    set_steps(sampler, first.steps)
    generators = picture_generators([request.seed for request in requests], noise_device or device)
    noise_dtype = dtype if noise_device is None else torch.float32
    shape = (LATENT_CHANNELS, first.height // PIXELS_PER_LATENT, first.width // PIXELS_PER_LATENT)
    latents = start_noise(generators, shape, noise_dtype, sampler=sampler_name, steps=first.steps)
    latents = latents.to(device, dtype) * sampler.init_noise_sigma
    return denoise(predict, sampler, latents, guidance_of(first), generators, on_step)


def guidance_of(request: ImageRequest) -> Guidance:
    """The guidance that a request asks for; a negative scale counts only where guidance is on."""
    return Guidance(request.scale, request.negative_scale if request.scale > 1.0 else None)
