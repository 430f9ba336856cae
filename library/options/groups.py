"""Old functions that put a group of options on a parser, for programs that build their own parsers from them.

A group is a list of names in the order of the original; the options themselves come from the concerns, so that
type, default, choices and help have one source. Options that a parser has already are left as they are.
"""

from __future__ import annotations

import argparse
from functools import cache

from library.options.declare import Option
from library.options.scripts import find_script

MODELS = "v2 v_parameterization pretrained_model_name_or_path tokenizer_cache_dir"
DATASET = """train_data_dir cache_info shuffle_caption caption_separator caption_extension caption_extention
    keep_tokens keep_tokens_separator secondary_separator enable_wildcard caption_prefix caption_suffix color_aug
    flip_aug face_crop_aug_range random_crop debug_dataset resolution cache_latents vae_batch_size
    cache_latents_to_disk skip_cache_check enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps
    bucket_no_upscale resize_interpolation token_warmup_min token_warmup_step alpha_mask dataset_class"""
CAPTION_DROPOUT = "caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate"
DREAMBOOTH = "reg_data_dir"
METADATA_FILE = "in_json dataset_repeats"
TRAINING = """output_dir output_name huggingface_repo_id huggingface_repo_type huggingface_path_in_repo
    huggingface_token huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload
    save_precision save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs
    save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_state save_state_on_train_end resume
    train_batch_size max_token_length mem_eff_attn torch_compile dynamo_backend xformers sdpa vae max_train_steps
    max_train_epochs max_data_loader_n_workers persistent_data_loader_workers seed gradient_checkpointing
    gradient_accumulation_steps mixed_precision full_fp16 full_bf16 fp8_base ddp_timeout
    ddp_gradient_as_bucket_view ddp_static_graph clip_skip logging_dir log_with log_prefix log_tracker_name
    wandb_run_name log_tracker_config wandb_api_key log_config noise_offset noise_offset_random_strength
    multires_noise_iterations ip_noise_gamma ip_noise_gamma_random_strength multires_noise_discount
    adaptive_noise_scale zero_terminal_snr min_timestep max_timestep loss_type huber_schedule huber_c huber_scale
    lowram highvram sample_every_n_steps sample_at_first sample_every_n_epochs sample_prompts sample_sampler
    config_file output_config metadata_title metadata_author metadata_description metadata_license metadata_tags"""
PRIOR = "prior_loss_weight"
OPTIMIZER = """optimizer_type use_8bit_adam use_lion_optimizer learning_rate max_grad_norm optimizer_args
    lr_scheduler_type lr_scheduler_args lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles
    lr_scheduler_power fused_backward_pass lr_scheduler_timescale lr_scheduler_min_lr_ratio"""
CUSTOM = "min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss"
WEIGHTED_CAPTIONS = "weighted_captions"
MASKED_LOSS = "conditioning_data_dir masked_loss"
SDXL = "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk disable_mmap_load_safetensors"
CONSOLE = "console_log_level console_log_file console_log_simple"
DEEPSPEED = """deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device
    offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients"""


@cache
def _options() -> dict[str, Option]:
    scripts = ("sdxl_train_network.py", "train_network.py")
    return {option.dest: option for script in scripts for option in find_script(script).options()}


def _add(parser: argparse.ArgumentParser, *groups: str) -> None:
    present = {action.dest for action in parser._actions}
    for name in " ".join(groups).split():
        if name not in present:
            _options()[name].add_to(parser)


def add_sd_models_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and tokenizer."""
    _add(parser, MODELS)


def add_sdxl_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Cached outputs of the text encoders."""
    _add(parser, SDXL)


def add_dataset_arguments(
    parser: argparse.ArgumentParser, support_dreambooth: bool, support_caption: bool, support_caption_dropout: bool
) -> None:
    """Pictures and captions; `support_caption` stands for the metadata file."""
    groups = [DATASET]
    groups += [CAPTION_DROPOUT] if support_caption_dropout else []
    groups += [DREAMBOOTH] if support_dreambooth else []
    groups += [METADATA_FILE] if support_caption else []
    _add(parser, *groups)


def add_training_arguments(parser: argparse.ArgumentParser, support_dreambooth: bool) -> None:
    """Length, precision, saving, logging, noise, samples."""
    _add(parser, TRAINING, *([PRIOR] if support_dreambooth else []))


def add_sd_saving_arguments(parser: argparse.ArgumentParser) -> None:
    """Form of the written model."""
    present = {action.dest for action in parser._actions}
    for option in find_script("train_db.py").options():
        if option.dest in ("save_model_as", "use_safetensors") and option.dest not in present:
            option.add_to(parser)


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Optimizer and schedule."""
    _add(parser, OPTIMIZER)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The data-set file."""
    _add(parser, "dataset_config")


def add_custom_train_arguments(parser: argparse.ArgumentParser, support_weighted_captions: bool = True) -> None:
    """Weights of the loss, and of words in captions."""
    _add(parser, CUSTOM, *([WEIGHTED_CAPTIONS] if support_weighted_captions else []))


def add_masked_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """Masks of the loss."""
    _add(parser, MASKED_LOSS)


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    """The console."""
    _add(parser, CONSOLE)


def add_deepspeed_arguments(parser: argparse.ArgumentParser) -> None:
    """DeepSpeed."""
    _add(parser, DEEPSPEED)
