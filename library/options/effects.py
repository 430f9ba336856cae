"""Given options that change nothing in this run, each with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.registries import LOSSES, find_optimizer, find_schedule

if TYPE_CHECKING:
    from library.options.parser import Resolved


@dataclass(frozen=True, slots=True)
class Need:
    """Options that work only under a condition.

    Attributes:
        names: the options; works: whether they do in this run; reason: what they need, for the message.
    """

    names: tuple[str, ...]
    works: Callable[[Resolved], bool]
    reason: str


def _given(*names: str) -> Callable[[Resolved], bool]:
    """True when one of the options is set to something."""
    return lambda options: any(bool(options.value(name)) for name in names)


def _loss_takes(name: str) -> Callable[[Resolved], bool]:
    return lambda options: any(r.name == options.objective.loss_type and name in r.takes for r in LOSSES)


def _schedule_takes(name: str) -> Callable[[Resolved], bool]:
    def works(options: Resolved) -> bool:
        record = find_schedule(options.optimizer.lr_scheduler or "")
        return record is None or name in record.takes

    return works


def _has_schedule(options: Resolved) -> bool:
    record = find_optimizer(options.optimizer.optimizer_type or "")
    return record is None or not record.schedule_free


def _trains_unet(options: Resolved) -> bool:
    return not options.network.network_train_text_encoder_only


def _trains_text(options: Resolved) -> bool:
    return not options.network.network_train_unet_only


def _text_encoder_learns(options: Resolved) -> bool:
    """Of a whole model."""
    stop = options.model_training.stop_text_encoder_training
    return options.model_training.train_text_encoder or (options.script == "train_db.py" and (stop is None or stop > 0))


def _classic_folders(options: Resolved) -> bool:
    return options.dataset.dataset_config is None


def _takes_pairs(options: Resolved) -> bool:
    """Whether the script trains on conditioning pictures (ControlNet and its relatives)."""
    return "control" in options.script


NEEDS: tuple[Need, ...] = (
    Need(("train_data_dir", "reg_data_dir", "in_json"), _classic_folders, "--dataset_config replaces it"),
    Need(("dataset_repeats",), _given("in_json", "dataset_config"), "needs --in_json"),
    Need(("reg_data_dir", "caption_extension"), lambda options: not options.value("in_json"),
         "the pictures and captions are those of --in_json"),
    Need(("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"),
         _given("enable_bucket", "dataset_config"), "needs --enable_bucket"),
    Need(("keep_tokens",), _given("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step", "dataset_config"),
         "needs --shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step"),
    Need(("token_warmup_min",), _given("token_warmup_step", "dataset_config"), "needs --token_warmup_step"),
    Need(("vae_batch_size",), _given("cache_latents", "dataset_config"), "needs --cache_latents"),
    Need(("skip_cache_check",), _given("cache_latents", "cache_text_encoder_outputs", "dataset_config"),
         "needs --cache_latents"),
    Need(("caption_dropout_every_n_epochs",), lambda options: not options.value("cache_text_encoder_outputs"),
         "the encoded captions are cached"),
    Need(("prior_loss_weight",), _given("reg_data_dir", "dataset_config"), "needs --reg_data_dir"),
    Need(("conditioning_data_dir",), lambda options: bool(options.value("masked_loss")) or _takes_pairs(options),
         "needs --masked_loss"),
    Need(("validation_seed", "max_validation_steps", "validate_every_n_steps", "validate_every_n_epochs"),
         _given("validation_split", "dataset_config"), "needs --validation_split"),
    Need(("use_style_template",), lambda options: not options.embedding.use_object_template,
         "--use_object_template wins"),
    Need(("init_word",), lambda options: not options.embedding.weights,
         "--weights says what the vectors start from"),
    Need(("ema_start", "ema_device"), _given("ema_decay"), "needs --ema_decay"),
    Need(("huber_schedule",), _loss_takes("huber_schedule"), "needs --loss_type huber or smooth_l1"),
    Need(("huber_c",), _loss_takes("huber_c"), "needs --loss_type huber or smooth_l1"),
    Need(("huber_scale",), _loss_takes("huber_scale"), "needs --loss_type huber or smooth_l1"),
    Need(("adaptive_noise_scale", "noise_offset_random_strength"), _given("noise_offset"), "needs --noise_offset"),
    Need(("multires_noise_discount",), _given("multires_noise_iterations"), "needs --multires_noise_iterations"),
    Need(("ip_noise_gamma_random_strength",), _given("ip_noise_gamma"), "needs --ip_noise_gamma"),
    Need(("lr_scheduler_num_cycles",), _schedule_takes("lr_scheduler_num_cycles"),
         "this --lr_scheduler does not use it"),
    Need(("lr_scheduler_power",), _schedule_takes("lr_scheduler_power"), "this --lr_scheduler does not use it"),
    Need(("lr_scheduler_timescale",), _schedule_takes("lr_scheduler_timescale"), "this --lr_scheduler does not use it"),
    Need(("lr_scheduler_min_lr_ratio",), _schedule_takes("lr_scheduler_min_lr_ratio"),
         "this --lr_scheduler does not use it"),
    Need(("lr_decay_steps",), _schedule_takes("lr_decay_steps"), "this --lr_scheduler does not use it"),
    Need(("lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps"), _has_schedule,
         "the optimizer is schedule-free"),
    Need(("unet_lr",), _trains_unet, "--network_train_text_encoder_only trains no U-Net part"),
    Need(("text_encoder_lr",), _trains_text, "--network_train_unet_only trains no text encoder part"),
    Need(("learning_rate_te", "learning_rate_te1", "learning_rate_te2"), _text_encoder_learns,
         "the text encoder is not trained"),
    Need(("use_safetensors",), lambda options: options.saving.save_model_as is None, "--save_model_as says it"),
    Need(("fp8_base",), lambda options: "model_training" not in options, "only frozen models can be held in 8 bits"),
    Need(("base_weights_multiplier",), _given("base_weights"), "needs --base_weights"),
    Need(("training_comment",), lambda options: not options.network.no_metadata, "--no_metadata leaves it out"),
    Need(("max_train_steps",), lambda options: not options.loop.max_train_epochs, "--max_train_epochs replaces it"),
    Need(("ddp_gradient_as_bucket_view", "ddp_static_graph"), lambda _: False,
         "gradients are averaged over processes without DDP"),
    Need(("clip_skip",), lambda options: "sdxl" not in options, "SDXL always takes the layer before the last"),
    Need(("disable_mmap_load_safetensors",), lambda _: False, "files are never mapped into memory"),
    Need(("highvram",), lambda _: False, "the memory cache is never cleared while training"),
    Need(("persistent_data_loader_workers",), _given("max_data_loader_n_workers"),
         "needs --max_data_loader_n_workers above 0"),
    Need(("skip_until_initial_step",), _given("initial_step", "initial_epoch"),
         "needs --initial_step or --initial_epoch"),
    Need(("initial_epoch",), lambda options: options.loop.initial_step is None, "--initial_step replaces it"),
    Need(("save_every_n_epochs",), lambda options: not options.saving.save_n_epoch_ratio,
         "--save_n_epoch_ratio replaces it"),
    Need(("save_last_n_epochs_state", "save_last_n_steps_state"), _given("save_state"), "needs --save_state"),
    Need(("save_state_on_train_end",), lambda options: not options.saving.save_state, "--save_state does it already"),
    Need(("sample_every_n_steps",), lambda options: not options.samples.sample_every_n_epochs,
         "--sample_every_n_epochs replaces it"),
    Need(("sample_sampler", "sample_prompts"),
         _given("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
         "needs --sample_every_n_steps or --sample_every_n_epochs"),
    Need(("dynamo_backend",), _given("torch_compile"), "needs --torch_compile"),
    Need(("cpu_offload_checkpointing", "gradient_checkpointing_interval"), _given("gradient_checkpointing"),
         "needs --gradient_checkpointing"),
    Need(("xformers", "sdpa"), lambda options: not options.precision.mem_eff_attn, "--mem_eff_attn wins"),
    Need(("sdpa",), lambda options: not options.precision.xformers, "--xformers wins"),
    Need(("log_tracker_name", "log_tracker_config", "log_config", "log_prefix"), _given("logging_dir", "log_with"),
         "needs --logging_dir or --log_with"),
    Need(("wandb_api_key", "wandb_run_name"), lambda options: options.logging.log_with in ("wandb", "all"),
         "needs --log_with wandb"),
    Need(("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token", "huggingface_repo_visibility",
          "async_upload"), _given("huggingface_repo_id", "resume_from_huggingface"), "needs --huggingface_repo_id"),
    Need(("zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device",
          "offload_param_nvme_path"), _given("deepspeed"), "needs --deepspeed"),
    Need(("zero3_init_flag",), lambda _: False, "the processes of a machine load one after the other"),
    Need(("zero3_save_16bit_model",), lambda _: False, "--save_precision says what is written"),
    Need(("fp16_master_weights_and_gradients",), lambda options: bool(
        options.distributed.deepspeed and options.precision.full_fp16), "needs --deepspeed and --full_fp16"),
)  # fmt: skip


def without_effect(options: Resolved) -> list[tuple[str, str]]:
    """(option, reason) of each given training option that changes nothing in this run."""
    found: dict[str, str] = {}
    for need in NEEDS:
        present = [name for name in need.names if name in options.given and name not in found]
        if present and not need.works(options):
            found.update(dict.fromkeys(present, need.reason))
    return list(found.items())
