"""Old import path of the SDXL U-Net and its layers."""

from library.porch import porch

NAMES = {
    "ADM_IN_CHANNELS": "library.models.unet_config:ADM_IN_CHANNELS",
    "BasicTransformerBlock": "library.models.layers:BasicTransformerBlock",
    "CrossAttention": "library.models.layers:CrossAttention",
    "Downsample2D": "library.models.unet_sdxl:Downsample2D",
    "FlashAttentionFunction": "library.models.old_attention:FlashAttentionFunction",
    "GroupNorm32": "library.models.unet_sdxl:GroupNorm32",
    "ResnetBlock2D": "library.models.unet_sdxl:ResnetBlock2D",
    "SdxlUNet2DConditionModel": "library.models.unet_sdxl:SdxlUNet2DConditionModel",
    "Transformer2DModel": "library.models.layers:Transformer2DModel",
    "Upsample2D": "library.models.layers:Upsample2D",
    "get_parameter_device": "library.models.old_attention:get_parameter_device",
    "get_parameter_dtype": "library.models.old_attention:get_parameter_dtype",
    "get_timestep_embedding": "library.models.old_attention:get_timestep_embedding_sdxl",
}
__getattr__, __dir__ = porch(__name__, NAMES)
