"""Old import path of model reading and writing for SD 1.x and 2.x."""

from library.porch import porch

_HERE = "library.models.porch_model_util"
_NAMES = """
    BETA_END BETA_START DIFFUSERS_REF_MODEL_ID_V1 DIFFUSERS_REF_MODEL_ID_V2 NUM_TRAIN_TIMESTEPS VAE_PREFIX
    conv_transformer_to_linear convert_ldm_clip_checkpoint_v1 convert_ldm_clip_checkpoint_v2
    convert_ldm_unet_checkpoint convert_ldm_vae_checkpoint convert_text_encoder_state_dict_to_sd_v2
    convert_unet_state_dict_to_sd convert_vae_state_dict create_unet_diffusers_config create_vae_diffusers_config
    get_model_version_str_for_sd1_sd2 is_safetensors linear_transformer_to_conv
    load_checkpoint_with_text_encoder_conversion load_file load_models_from_stable_diffusion_checkpoint load_vae
    save_diffusers_checkpoint save_stable_diffusion_checkpoint
"""
NAMES = {name: f"{_HERE}:{name}" for name in _NAMES.split()} | {
    "UNet2DConditionModel": "library.models.unet_sd:UNet2DConditionModel",
    "make_bucket_resolutions": "library.data.classic:make_bucket_resolutions",
    "save_file": "library.models.checkpoint_writer:save_tensors",
}
__getattr__, __dir__ = porch(__name__, NAMES)
