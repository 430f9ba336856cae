"""Old import path of the SD U-Net and its layers."""

from library.porch import porch

NAMES = {
    "BasicTransformerBlock": "library.models.layers:BasicTransformerBlock",
    "CrossAttention": "library.models.layers:CrossAttention",
    "CrossAttnDownBlock2D": "library.models.unet_blocks:CrossAttnDownBlock2D",
    "CrossAttnUpBlock2D": "library.models.unet_blocks:CrossAttnUpBlock2D",
    "DownBlock2D": "library.models.unet_blocks:DownBlock2D",
    "Downsample2D": "library.models.layers:Downsample2D",
    "FlashAttentionFunction": "library.models.old_attention:FlashAttentionFunction",
    "ResnetBlock2D": "library.models.layers:ResnetBlock2D",
    "SampleOutput": "library.models.layers:SampleOutput",
    "Transformer2DModel": "library.models.layers:Transformer2DModel",
    "UNet2DConditionModel": "library.models.unet_sd:UNet2DConditionModel",
    "UNetMidBlock2DCrossAttn": "library.models.unet_blocks:UNetMidBlock2DCrossAttn",
    "UpBlock2D": "library.models.unet_blocks:UpBlock2D",
    "Upsample2D": "library.models.layers:Upsample2D",
    "get_parameter_device": "library.models.old_attention:get_parameter_device",
    "get_parameter_dtype": "library.models.old_attention:get_parameter_dtype",
    "get_timestep_embedding": "library.models.old_attention:get_timestep_embedding",
}
__getattr__, __dir__ = porch(__name__, NAMES)
