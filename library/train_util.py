"""Old import path of training helpers; entries grouped by the room that has them now."""

from library.porch import porch

NAMES = {
    # runtime
    "patch_accelerator_for_fp16_training": "library.runtime.porch_adapters:patch_accelerator_for_fp16_training",
    "prepare_accelerator": "library.runtime.porch_adapters:prepare_accelerator",
    "prepare_dtype": "library.runtime.porch_adapters:prepare_dtype",
    "replace_unet_modules": "library.runtime.porch_adapters:replace_unet_modules",
    # models
    "FlashAttentionFunction": "library.models.old_attention:FlashAttentionFunction",
    "UNet2DConditionModel": "library.models.unet_sd:UNet2DConditionModel",
}
__getattr__, __dir__ = porch(__name__, NAMES)
