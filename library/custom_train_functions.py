"""Old import path of the training objective's functions and of weighted captions."""

from library.porch import porch

NAMES = {
    # options
    "add_custom_train_arguments": "library.options.groups:add_custom_train_arguments",
    # diffusion
    "add_v_prediction_like_loss": "library.diffusion.classic:add_v_prediction_like_loss",
    "apply_debiased_estimation": "library.diffusion.classic:apply_debiased_estimation",
    "apply_masked_loss": "library.diffusion.classic:apply_masked_loss",
    "apply_noise_offset": "library.diffusion.classic:apply_noise_offset",
    "apply_snr_weight": "library.diffusion.classic:apply_snr_weight",
    "fix_noise_scheduler_betas_for_zero_terminal_snr": (
        "library.diffusion.classic:fix_noise_scheduler_betas_for_zero_terminal_snr"
    ),
    "get_snr_scale": "library.diffusion.classic:get_snr_scale",
    "prepare_scheduler_for_custom_training": "library.diffusion.classic:prepare_scheduler_for_custom_training",
    "pyramid_noise_like": "library.diffusion.classic:pyramid_noise_like",
    "scale_v_prediction_loss_like_noise_prediction": (
        "library.diffusion.classic:scale_v_prediction_loss_like_noise_prediction"
    ),
    # training
    "get_prompts_with_weights": "library.training.classic_text:get_prompts_with_weights",
    "get_unweighted_text_embeddings": "library.training.classic_text:get_unweighted_text_embeddings",
    "get_weighted_text_embeddings": "library.training.classic_text:get_weighted_text_embeddings",
    "pad_tokens_and_weights": "library.training.classic_text:pad_tokens_and_weights",
    "parse_prompt_attention": "library.training.classic_text:parse_prompt_attention",
}
__getattr__, __dir__ = porch(__name__, NAMES)
