"""Old import path of training helpers; entries grouped by the room that has them now."""

from library.porch import porch

NAMES = {
    # data
    "BucketManager": "library.data.classic:BucketManager",
    "IMAGE_EXTENSIONS": "library.data.classic:IMAGE_EXTENSIONS",
    "ImageInfo": "library.data.classic:ImageInfo",
    "ImageLoadingDataset": "library.data.classic:ImageLoadingDataset",
    "cache_batch_latents": "library.data.classic:cache_batch_latents",
    "collator_class": "library.data.classic:collator_class",
    "debug_dataset": "library.data.classic:debug_dataset",
    "default_if_none": "library.data.classic:default_if_none",
    "is_disk_cached_latents_is_expected": "library.data.classic:is_disk_cached_latents_is_expected",
    "load_image": "library.data.classic:load_image",
    "load_latents_from_disk": "library.data.classic:load_latents_from_disk",
    "save_latents_to_disk": "library.data.classic:save_latents_to_disk",
    "trim_and_resize_if_required": "library.data.classic:trim_and_resize_if_required",
    "DatasetGroup": "library.data.dataset:DatasetGroup",
    "IMAGE_TRANSFORMS": "library.data.classic:image_transforms",
    "glob_images": "library.data.listing:glob_images",
    "glob_images_pathlib": "library.data.listing:glob_images_pathlib",
    # training: data sets with the old constructors
    "BaseDataset": "library.training.classic_datasets:BaseDataset",
    "BaseSubset": "library.training.classic_datasets:BaseSubset",
    "DreamBoothDataset": "library.training.classic_datasets:DreamBoothDataset",
    "DreamBoothSubset": "library.training.classic_datasets:DreamBoothSubset",
    "MinimalDataset": "library.training.classic_datasets:MinimalDataset",
    "load_arbitrary_dataset": "library.training.classic_datasets:load_arbitrary_dataset",
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
