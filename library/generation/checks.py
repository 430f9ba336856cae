"""What the picture script refuses before a model is loaded: what cannot work, and what it cannot do yet."""

from __future__ import annotations

from library.messages import UserError, warn_once
from library.options.declare import options_of
from library.options.image import ImageConfig
from library.options.image_model import ImageModelConfig
from library.options.image_passes import ImagePassesConfig

# Option that switches a feature on -> what the feature is called. Options beside them only tune it.
NOT_SUPPORTED_YET = {
    "image_path": "image to image",
    "mask_path": "inpainting and regional networks",
    "guide_image_path": "guide pictures",
    "network_regional_mask_max_color_codes": "regional networks",
    "highres_fix_scale": "the high-resolution fix",
    "control_net_models": "ControlNet",
    "control_net_lllite_models": "ControlNet-LLLite",
    "clip_vision_strength": "pooled text from a picture",
    "clip_guidance_scale": "guidance by CLIP",
    "clip_image_guidance_scale": "guidance by CLIP",
    "vgg16_guidance_scale": "guidance by VGG16",
    "ds_depth_1": "Deep Shrink",
    "gradual_latent_timesteps": "Gradual Latent",
}
_AT_LEAST_ONE = ("n_iter", "images_per_prompt", "batch_size", "steps", "max_embeddings_multiples", "W", "H")


def check_options(
    image: ImageConfig, model: ImageModelConfig, passes: ImagePassesConfig, *, family_name: str = "sd"
) -> None:
    """Refuse options that contradict each other, are out of range or belong to features that are still to come.

    Raises:
        UserError: the first such option.
    """
    for config in (image, model, passes):
        _refuse_not_supported(config)
    _warn_of_tuning(passes)
    for name in _AT_LEAST_ONE:
        value = getattr(image, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is below 1", "give 1 or more")
    if image.strength is not None and not 0 <= image.strength <= 1:
        raise UserError(f"--strength {image.strength} is outside 0..1", "use a value between 0 and 1")
    _check_model(model)
    if family_name == "sdxl" and model.clip_skip is not None:
        warn_once("--clip_skip has no effect: SDXL always takes the layer before the last")
    if image.use_original_file_name:
        warn_once("--use_original_file_name has no effect without --image_path")


def _check_model(model: ImageModelConfig) -> None:
    if not model.ckpt:
        raise UserError("no model given", "name a checkpoint file or a diffusers folder with --ckpt")
    for name in ("clip_skip", "vae_slices"):
        value = getattr(model, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is below 1", "give 1 or more, or leave it out")
    if model.vae_batch_size is not None and model.vae_batch_size <= 0:
        raise UserError(f"--vae_batch_size {model.vae_batch_size} is not above 0", "give a number or a share below 1")
    if model.v_parameterization and not model.v2:
        warn_once("--v_parameterization without --v2: right only for a 1.x model that predicts velocity")
    if model.v2 and model.clip_skip is not None:
        warn_once("--clip_skip with --v2 is unusual: SD 2.x models use the layer before the last anyway")
    if model.no_half_vae and not (model.fp16 or model.bf16):
        warn_once("--no_half_vae has no effect: without --fp16 and --bf16 the VAE is in float32 anyway")
    if model.fp16 and model.bf16:
        warn_once("--bf16 has no effect: --fp16 wins")


def _refuse_not_supported(config: object) -> None:
    for option in options_of(type(config)):
        feature = NOT_SUPPORTED_YET.get(option.dest)
        if feature is not None and getattr(config, option.dest) != option.default:
            raise UserError(f"--{option.dest}: {feature} is not supported yet", "leave the option out")


def _warn_of_tuning(passes: ImagePassesConfig) -> None:
    given = [o.dest for o in options_of(ImagePassesConfig) if getattr(passes, o.dest) != o.default]
    if given:
        warn_once(f"no effect: {', '.join('--' + name for name in given)} (the feature is not switched on)")
