"""Old import path of model reading and writing for SDXL."""

from library.porch import porch

_HERE = "library.models.porch_sdxl_model_util"
_NAMES = """
    DIFFUSERS_REF_MODEL_ID_SDXL DIFFUSERS_SDXL_UNET_CONFIG MODEL_VERSION_SDXL_BASE_V1_0 VAE_SCALE_FACTOR
    _load_state_dict_on_device convert_diffusers_unet_state_dict_to_sdxl convert_sdxl_text_encoder_2_checkpoint
    convert_sdxl_unet_state_dict_to_diffusers convert_text_encoder_2_state_dict_to_sdxl convert_unet_state_dict
    load_models_from_sdxl_checkpoint make_unet_conversion_map save_diffusers_checkpoint
    save_stable_diffusion_checkpoint
"""
NAMES = {name: f"{_HERE}:{name}" for name in _NAMES.split()}
__getattr__, __dir__ = porch(__name__, NAMES)
