"""Second passes, controls and guidance of the picture scripts."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePassesConfig:
    """Second passes, controls and guidance of the picture scripts."""

    highres_fix_scale: float | None = option(None, "draw first at this share of the size, then enlarge and draw again")
    highres_fix_steps: int = option(28, "sampler steps of the first pass")
    highres_fix_strength: float | None = option(None, "strength of the second pass; --strength when left out")
    highres_fix_save_1st: bool = option(False, "save the pictures of the first pass too")
    highres_fix_latents_upscaling: bool = option(False, "enlarge the latents instead of the picture")
    highres_fix_upscaler: str | None = option(None, "module that enlarges between the passes")
    highres_fix_upscaler_args: str | None = option(
        None, "arguments of the upscaler as KEY=VALUE, several joined with ;"
    )
    highres_fix_disable_control_net: bool = option(False, "no ControlNet in the second pass")
    control_net_models: list[str] | None = option(None, "ControlNet files or folders")
    control_net_preps: list[str] | None = option(
        None, "what is done to the guide picture of each ControlNet, e.g. canny_63_191"
    )
    control_net_weights: list[float] | None = option(None, "weights of the ControlNets; 1.0 where the list is shorter")
    control_net_ratios: list[float] | None = option(
        None, "share of the steps, from 0 to 1, in which each ControlNet works"
    )
    control_net_lllite_models: list[str] | None = option(None, "ControlNet-LLLite files")
    control_net_multipliers: list[float] | None = option(
        None, "strengths of the ControlNet-LLLites; 1.0 where the list is shorter"
    )
    clip_vision_strength: float | None = option(
        None, "take the pooled text from the picture of --image_path, at this strength"
    )
    clip_guidance_scale: float = option(0.0, "strength of guidance by CLIP towards the prompt (0 = off)")
    clip_image_guidance_scale: float = option(0.0, "strength of guidance by CLIP towards the guide picture (0 = off)")
    vgg16_guidance_scale: float = option(0.0, "strength of guidance by VGG16 towards the guide picture (0 = off)")
    vgg16_guidance_layer: int = option(20, "layer of VGG16 that is compared")
    ds_depth_1: int | None = option(
        None, "Deep Shrink: U-Net block before which features are scaled first; switches it on"
    )
    ds_timesteps_1: int = option(650, "Deep Shrink: timestep down to which the first depth is used")
    ds_depth_2: int | None = option(None, "Deep Shrink: block used after the first one")
    ds_timesteps_2: int = option(650, "Deep Shrink: timestep down to which the second depth is used")
    ds_ratio: float = option(0.5, "Deep Shrink: scale of the features")
    gradual_latent_timesteps: int | None = option(
        None, "Gradual Latent: timestep below which the picture grows; switches it on, euler_a only"
    )
    gradual_latent_ratio: float = option(0.5, "Gradual Latent: share of the size at the start")
    gradual_latent_ratio_step: float = option(0.125, "Gradual Latent: what the share grows by each time")
    gradual_latent_every_n_steps: int = option(3, "Gradual Latent: steps between two growths")
    gradual_latent_s_noise: float = option(1.0, "Gradual Latent: factor of the noise while growing")
    gradual_latent_unsharp_params: str | None = option(
        None, "Gradual Latent: unsharp mask as KERNEL,SIGMA,STRENGTH[,TARGET]"
    )
