"""Second passes, controls and guidance of the picture scripts."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePassesConfig:
    """Second passes, controls and guidance of the picture scripts."""

    highres_fix_scale: float | None = option(None, "")
    highres_fix_steps: int = option(28, "")
    highres_fix_strength: float | None = option(None, "")
    highres_fix_save_1st: bool = option(False, "")
    highres_fix_latents_upscaling: bool = option(False, "")
    highres_fix_upscaler: str | None = option(None, "")
    highres_fix_upscaler_args: str | None = option(None, "")
    highres_fix_disable_control_net: bool = option(False, "")
    control_net_models: list[str] | None = option(None, "")
    control_net_preps: list[str] | None = option(None, "")
    control_net_weights: list[float] | None = option(None, "")
    control_net_ratios: list[float] | None = option(None, "")
    clip_guidance_scale: float = option(0.0, "")
    clip_image_guidance_scale: float = option(0.0, "")
    vgg16_guidance_scale: float = option(0.0, "")
    vgg16_guidance_layer: int = option(20, "")
    ds_depth_1: int | None = option(None, "")
    ds_timesteps_1: int = option(650, "")
    ds_depth_2: int | None = option(None, "")
    ds_timesteps_2: int = option(650, "")
    ds_ratio: float = option(0.5, "")
    gradual_latent_timesteps: int | None = option(None, "")
    gradual_latent_ratio: float = option(0.5, "")
    gradual_latent_ratio_step: float = option(0.125, "")
    gradual_latent_every_n_steps: int = option(3, "")
    gradual_latent_s_noise: float = option(1.0, "")
    gradual_latent_unsharp_params: str | None = option(None, "")
