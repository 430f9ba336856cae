"""Options that the original's scripts do not have: this project's own, and those its later releases added.

The frozen-command-line test reads these tables; the generated docs mark the options with them.
"""

from __future__ import annotations

# This project's own -> why.
OWN: dict[str, str] = {
    "strict": "unknown keys of a config file as an error",
    "dump_schema": "front ends build their forms from it",
    "dry_run": "the effective settings without a run",
    "ema_decay": "a moving average of what is trained",
    "ema_device": "where that average is kept",
    "ema_start": "when that average begins",
    "no_report": "a training without the page about it",
    "gradient_checkpointing_interval": "a choice between all blocks and none",
    "nan_policy": "a bad update need not end a long run",
    "verify": "whether cache files hold, without a model",
    "prune": "cache files that serve nobody, deleted",
    "json": "output of the model tools for other programs",
    "ignore_exif_orientation": "photographs stand upright; byte compatibility with the original",
    "detector": "faces without a package that few can install",
    "cascade_file": "such a detector of OpenCV",
    "detections_file": "faces that another program found",
    "score_threshold": "how sure a face must be",
    "no_duplicates": "a fast look at a large data set",
    "processes": "steps of a training on several devices, before it is started",
    "page": "the data set to look at",
    "pictures_per_bucket": "how much of it",
    "script": "whose options are given",
    "on_bad_image": "one broken picture need not stop a run",
    "skip_image_resolution": "small pictures need not be enlarged",
}

# Scripts of this project that the original and its later releases do not have.
OWN_SCRIPTS: frozenset[str] = frozenset(
    {"networks/convert_lora.py", "tools/inspect_dataset.py", "tools/inspect_model.py", "tools/report_run.py"}
)

# Of sd-scripts 0.7.1 to 0.10.1, in every script that has the concern.
LATER: frozenset[str] = frozenset(
    {
        "alpha_mask",
        "cache_info",
        "caption_separator",
        "clamp_quantile",
        "conditioning_data_dir",
        "console_log_file",
        "console_log_level",
        "console_log_simple",
        "cpu_offload_checkpointing",
        "ddp_gradient_as_bucket_view",
        "ddp_static_graph",
        "ddp_timeout",
        "debiased_estimation_loss",
        "deepspeed",
        "ds_depth_1",
        "ds_depth_2",
        "ds_ratio",
        "ds_timesteps_1",
        "ds_timesteps_2",
        "disable_mmap_load_safetensors",
        "dynamo_backend",
        "enable_wildcard",
        "fp16_master_weights_and_gradients",
        "fp8_base",
        "fp8_base_unet",
        "fused_backward_pass",
        "fused_optimizer_groups",
        "gradual_latent_every_n_steps",
        "gradual_latent_ratio",
        "gradual_latent_ratio_step",
        "gradual_latent_s_noise",
        "gradual_latent_timesteps",
        "gradual_latent_unsharp_params",
        "highvram",
        "huber_c",
        "huber_scale",
        "huber_schedule",
        "initial_epoch",
        "initial_step",
        "ip_noise_gamma_random_strength",
        "keep_tokens_separator",
        "log_config",
        "loss_type",
        "lbws",
        "learning_rate_te",
        "learning_rate_te1",
        "learning_rate_te2",
        "load_original_model_to",
        "load_precision",
        "load_tuned_model_to",
        "lr_decay_steps",
        "lr_scheduler_min_lr_ratio",
        "lr_scheduler_timescale",
        "masked_loss",
        "max_validation_steps",
        "metadata",
        "metadata_is_negative_embedding",
        "metadata_merged_from",
        "metadata_preprocessor",
        "metadata_thumbnail",
        "metadata_trigger_phrase",
        "metadata_usage_hint",
        "min_diff",
        "new_conv_rank",
        "noise_offset_random_strength",
        "offload_optimizer_device",
        "offload_optimizer_nvme_path",
        "offload_param_device",
        "offload_param_nvme_path",
        "resize_interpolation",
        "sample_at_first",
        "save_state_on_train_end",
        "secondary_separator",
        "skip_cache_check",
        "skip_until_initial_step",
        "text_encoder_batch_size",
        "torch_compile",
        "validate_every_n_epochs",
        "validate_every_n_steps",
        "validation_seed",
        "validation_split",
        "variant",
        "wandb_run_name",
        "zero3_init_flag",
        "zero3_save_16bit_model",
        "zero_stage",
    }
)

# Options of some training scripts of sd-scripts that every training script has here, as far as it can use them.
EVERYWHERE: frozenset[str] = frozenset(
    {
        "cache_text_encoder_outputs",
        "cache_text_encoder_outputs_to_disk",
        "conditioning_data_dir",
        "cpu_offload_checkpointing",
        "initial_epoch",
        "initial_step",
        "masked_loss",
        "max_validation_steps",
        "no_half_vae",
        "prior_loss_weight",
        "skip_until_initial_step",
        "validate_every_n_epochs",
        "validate_every_n_steps",
        "validation_seed",
        "validation_split",
        "weighted_captions",
    }
)

# Of caching tools of successors, for model families that are not here.
OTHER_FAMILIES: frozenset[str] = frozenset({"controlnet_model_name_or_path", "model_type"})

# Original options whose type is wider here: option -> (type there, type here).
WIDER: dict[str, tuple[str, str]] = {"lr_warmup_steps": ("int", "int_or_ratio")}

# Original options of one value that take several here, as in later releases.
SEVERAL: frozenset[str] = frozenset({"text_encoder_lr"})

# Choices that options have here beside those of the original or its later releases.
MORE_CHOICES: dict[str, tuple[str, ...]] = {"resize_interpolation": ("auto",)}
