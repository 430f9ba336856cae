"""Old import path of helpers of SDXL trainings."""

from library.porch import porch

_MODELS = "library.models.porch_sdxl_train_util"
_NAMES = """
    TOKENIZER1_PATH TOKENIZER2_PATH _load_target_model get_size_embeddings get_timestep_embedding load_target_model
    load_tokenizers match_mixed_precision timestep_embedding
"""
NAMES = {name: f"{_MODELS}:{name}" for name in _NAMES.split()} | {
    "add_sdxl_training_arguments": "library.options.groups:add_sdxl_training_arguments",
    "sample_images": "library.training.classic_samples:sample_images_sdxl",
    "save_sd_model_on_epoch_end_or_stepwise": (
        "library.training.classic_saving:save_sdxl_model_on_epoch_end_or_stepwise"
    ),
    "save_sd_model_on_train_end": "library.training.classic_saving:save_sdxl_model_on_train_end",
    "verify_sdxl_training_args": "library.options.sdxl:verify_sdxl_training_args",
}
__getattr__, __dir__ = porch(__name__, NAMES)
