"""Combinations of options that cannot work or mean nothing, found before anything is loaded.

Each check is a function of the resolved options; errors name the options and the remedy, warnings are said once.
Checks that need the data set, the model or a package live where those are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.messages import UserError, warn_once
from library.options.model_training import block_rates
from library.options.registries import SCHEDULES, find_optimizer, find_schedule, nearest
from library.options.scripts import find_script
from library.options.sdxl import require_frozen_encoders, verify_sdxl_training_args
from library.options.values import key_values

if TYPE_CHECKING:
    from library.options.parser import Resolved


def check(options: Resolved) -> None:
    """Run all checks that the script's concerns allow.

    Raises:
        UserError: the first combination that cannot work.
    """
    check_required(options)
    for concern, function in _CHECKS:
        if concern in options:
            function(options)


def check_required(options: Resolved) -> None:
    """Options without which the script has nothing to do."""
    if options.value("debug_dataset"):
        return
    missing = [name for name in find_script(options.script).required if not options.value(name)]
    if missing:
        flags = ", ".join(f"--{name}" for name in missing)
        where = "on the command line or in --config_file" if "config_file" in options else "on the command line"
        raise UserError(f"{flags} missing", f"give {'it' if len(missing) == 1 else 'them'} {where}")


def check_model(options: Resolved) -> None:
    """SD 2.x, velocity and clip skip."""
    model = options.model
    if model.clip_skip is not None and model.clip_skip < 1:
        raise UserError(f"--clip_skip {model.clip_skip} is below 1", "1 is the last layer; leave it out for that")
    if find_script(options.script).family == "sdxl":
        verify_sdxl_training_args(model)
        return
    if model.v_parameterization and not model.v2:
        warn_once("--v_parameterization without --v2: right only for a 1.x model that was trained on velocity")
    if model.v2 and model.clip_skip is not None:
        warn_once("--clip_skip with --v2 is unusual: SD 2.x models use the layer before the last anyway")


def check_data(options: Resolved) -> None:
    """Sources, batch size, augmentation against caching, probabilities."""
    data = options.dataset
    if data.dataset_config is not None:
        _check_dataset_file(options)
    elif not (data.train_data_dir or data.dataset_class or options.value("in_json")):
        raise UserError("no pictures given", "give --train_data_dir or --dataset_config")
    _at_least(data, 1, "train_batch_size", "bucket_reso_steps", "min_bucket_reso", "vae_batch_size", "dataset_repeats")
    _share(data, "caption_dropout_rate", "caption_tag_dropout_rate", "validation_split")
    if data.min_bucket_reso > data.max_bucket_reso:
        raise UserError(
            f"--min_bucket_reso {data.min_bucket_reso} is larger than --max_bucket_reso {data.max_bucket_reso}",
            "exchange them",
        )


def _check_dataset_file(options: Resolved) -> None:
    from library.options.config_file import read_toml, refuse_training_file

    path = Path(options.dataset.dataset_config)
    if not path.is_file():
        raise UserError(f"--dataset_config {path}: no such file", "check the path")
    if path.suffix.lower() == ".toml":
        known = {option.dest for option in find_script(options.script).options()}
        refuse_training_file(path, read_toml(path), known - _DATASET_NAMES)


# Options that a data-set file may have at its top level too, as keys of subsets.
_DATASET_NAMES = frozenset(
    {"resolution", "caption_extension", "keep_tokens", "shuffle_caption", "flip_aug", "color_aug", "random_crop"}
)


def check_length(options: Resolved) -> None:
    """Steps, epochs, accumulation, loader, resume."""
    loop = options.loop
    _at_least(loop, 1, "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "initial_epoch")
    _at_least(loop, 0, "max_data_loader_n_workers", "initial_step", "seed")
    if loop.seed is not None and loop.seed >= 2**32:
        raise UserError(f"--seed {loop.seed} is too large", f"give a number below {2**32}")
    if options.value("resume_from_huggingface") and not loop.resume:
        raise UserError("--resume_from_huggingface without --resume", "give --resume USER/REPO/PATH")


def check_optimizer(options: Resolved) -> None:
    """Deprecated flags, arguments, schedule by name and its needs."""
    optimizer = options.optimizer
    old = [n for n in ("use_8bit_adam", "use_lion_optimizer") if getattr(optimizer, n)]
    if len(old) == 2 or (old and optimizer.optimizer_type):
        raise UserError(f"--{old[0]} together with another optimizer", "use --optimizer_type alone")
    if optimizer.learning_rate is not None and optimizer.learning_rate < 0:
        raise UserError(f"--learning_rate {optimizer.learning_rate} is negative", "give 0 or more")
    _at_least(optimizer, 0, "max_grad_norm", "lr_warmup_steps", "lr_decay_steps")
    key_values(optimizer.optimizer_args, "--optimizer_args")
    arguments = key_values(optimizer.lr_scheduler_args, "--lr_scheduler_args")
    if not old and not _schedule_is_unused(optimizer):
        _check_schedule(options, arguments)


def check_updates(options: Resolved) -> None:
    """Updates inside the backward pass leave no gradients to add up, to scale or to average."""
    groups = options.value("fused_optimizer_groups")
    flags = ["--fused_backward_pass"] * options.optimizer.fused_backward_pass
    flags += ["--fused_optimizer_groups"] * (groups is not None)
    if groups is not None and groups < 1:
        raise UserError(f"--fused_optimizer_groups {groups} is below 1", "10 is usual")
    if len(flags) > 1:
        raise UserError("--fused_backward_pass with --fused_optimizer_groups", "give one of them")
    if flags and options.loop.gradient_accumulation_steps > 1:
        raise UserError(
            f"{flags[0]} with --gradient_accumulation_steps {options.loop.gradient_accumulation_steps}",
            "leave one of them out: gradients are gone as soon as they are there",
        )
    if flags and options.precision.mixed_precision == "fp16":
        raise UserError(f"{flags[0]} with --mixed_precision fp16", "use --mixed_precision bf16")


def _schedule_is_unused(optimizer: Any) -> bool:
    """Schedule-free optimizers take none; Adafactor with its relative step brings its own."""
    if (optimizer.optimizer_type or "").lower().endswith("schedulefree"):
        return True
    arguments = key_values(optimizer.optimizer_args, "--optimizer_args")
    return _is_adafactor(optimizer) and arguments.get("relative_step", True) is not False


def _is_adafactor(optimizer: Any) -> bool:
    record = find_optimizer(optimizer.optimizer_type or "")
    return record is not None and record.name == "AdaFactor"


def _check_schedule(options: Resolved, arguments: dict[str, Any]) -> None:
    optimizer = options.optimizer
    if optimizer.lr_scheduler_type:
        if optimizer.lr_warmup_steps:
            raise UserError("--lr_warmup_steps with --lr_scheduler_type", "leave --lr_warmup_steps out")
        return
    record = find_schedule(optimizer.lr_scheduler)
    if record is None:
        names = [r.name for r in SCHEDULES]
        near = nearest(optimizer.lr_scheduler, names, count=1)
        raise UserError(
            f"--lr_scheduler {optimizer.lr_scheduler!r} is unknown",
            f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}",
        )
    if record.name == "adafactor" and not _is_adafactor(optimizer):
        raise UserError("--lr_scheduler adafactor without its optimizer", "add --optimizer_type AdaFactor")
    if "lr_warmup_steps" in record.forbids and optimizer.lr_warmup_steps:
        raise UserError(
            f"--lr_scheduler {record.name} has no warm-up",
            "use constant_with_warmup, or leave --lr_warmup_steps out",
        )
    if record.needs and not any(name in arguments or options.value(name) for name in record.needs):
        flags = [f"--{n}" if hasattr(optimizer, n) else f"--lr_scheduler_args {n}=..." for n in record.needs]
        raise UserError(f"--lr_scheduler {record.name} lacks a setting", f"give {' or '.join(flags)}")


def check_objective(options: Resolved) -> None:
    """Noise, timesteps and loss weights that need or exclude each other."""
    objective, model = options.objective, options.model
    v = model.v_parameterization
    if objective.adaptive_noise_scale is not None and objective.noise_offset is None:
        raise UserError("--adaptive_noise_scale without --noise_offset", "give --noise_offset too")
    if objective.scale_v_pred_loss_like_noise_pred and not v:
        raise UserError(
            "--scale_v_pred_loss_like_noise_pred without --v_parameterization", "give both, or leave it out"
        )
    if objective.v_pred_like_loss and v:
        raise UserError("--v_pred_like_loss with --v_parameterization", "the loss is on velocity already; leave it out")
    if objective.zero_terminal_snr and not v:
        warn_once("--zero_terminal_snr without --v_parameterization: noise prediction learns nothing at pure noise")
    low = objective.min_timestep if objective.min_timestep is not None else 0
    high = objective.max_timestep if objective.max_timestep is not None else 1000
    if not 0 <= low < high <= 1000:
        raise UserError(
            f"--min_timestep {low} and --max_timestep {high} give no range",
            "the first must be below the second, both between 0 and 1000",
        )


def check_precision(options: Resolved) -> None:
    """Half-precision training, checkpointing, attention."""
    precision = options.precision
    for name, kind in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(precision, name) and precision.mixed_precision != kind:
            raise UserError(f"--{name} without --mixed_precision {kind}", f"add --mixed_precision {kind}")
    for name in ("fp8_base", "fp8_base_unet"):
        if options.value(name) and precision.mixed_precision == "no":
            raise UserError(f"--{name} without --mixed_precision", "add --mixed_precision bf16 or fp16")
    _at_least(precision, 1, "gradient_checkpointing_interval")


def check_saving(options: Resolved) -> None:
    """The folder, intervals and retention."""
    saving = options.saving
    if saving.output_dir and Path(saving.output_dir).is_file():
        raise UserError(f"--output_dir {saving.output_dir} is a file", "give a folder; it is made if it does not exist")
    _at_least(
        saving,
        1,
        "save_every_n_epochs",
        "save_every_n_steps",
        "save_n_epoch_ratio",
        "save_last_n_epochs",
        "save_last_n_steps",
    )
    _at_least(saving, 0, "save_last_n_epochs_state", "save_last_n_steps_state")
    for unit in ("epochs", "steps"):
        kept = [n for n in (f"save_last_n_{unit}", f"save_last_n_{unit}_state") if getattr(saving, n)]
        if kept and not (getattr(saving, f"save_every_n_{unit}") or (unit == "epochs" and saving.save_n_epoch_ratio)):
            raise UserError(f"--{kept[0]} without --save_every_n_{unit}", f"give --save_every_n_{unit} too")
    if options.value("save_state_to_huggingface") and not options.value("huggingface_repo_id"):
        raise UserError("--save_state_to_huggingface without --huggingface_repo_id", "give the repository too")


def check_samples(options: Resolved) -> None:
    """Sample pictures need prompts and an interval above 0."""
    samples = options.samples
    wanted = []
    for name in ("sample_every_n_steps", "sample_every_n_epochs"):
        value = getattr(samples, name)
        if value is not None and value <= 0:
            warn_once(f"--{name} {value} draws no sample pictures")
        elif value is not None:
            wanted.append(f"--{name}")
    if samples.sample_at_first:
        wanted.append("--sample_at_first")
    if wanted and not samples.sample_prompts:
        raise UserError(f"{wanted[0]} without --sample_prompts", "give a file of prompts")


def check_validation(options: Resolved) -> None:
    """Intervals of the validation loss."""
    _at_least(options.validation, 1, "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")


def check_ema(options: Resolved) -> None:
    """The decay is a share; optimizers that average themselves need no second average."""
    decay = options.ema.ema_decay
    _at_least(options.ema, 0, "ema_start")
    if decay is None:
        return
    if not 0 <= decay < 1:
        raise UserError(f"--ema_decay {decay} is not in 0 to 1", "give a number such as 0.999")
    if (options.optimizer.optimizer_type or "").lower().endswith("schedulefree"):
        raise UserError("--ema_decay with a schedule-free optimizer", "it averages the weights itself: leave it out")


def check_logging(options: Resolved) -> None:
    """Trackers and their folder."""
    logging = options.logging
    if logging.logging_dir and Path(logging.logging_dir).is_file():
        raise UserError(f"--logging_dir {logging.logging_dir} is a file", "give a folder")
    if logging.log_with in ("tensorboard", "all") and not logging.logging_dir:
        raise UserError(f"--log_with {logging.log_with} without --logging_dir", "give a folder for the logs")
    secrets = [n for n in ("wandb_api_key", "huggingface_token") if options.value(n)]
    if secrets and (logging.log_with in ("wandb", "all") or logging.log_config):
        names = ", ".join(f"--{n}" for n in secrets)
        warn_once(f"{names} is a secret on the command line; log in with the service's own command instead")


def check_network(options: Resolved) -> None:
    """What of the network trains, and where it starts."""
    network = options.network
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        raise UserError(
            "--network_train_unet_only with --network_train_text_encoder_only leaves nothing to train",
            "leave one of them out",
        )
    if network.dim_from_weights and not network.network_weights:
        raise UserError("--dim_from_weights without --network_weights", "give the network file")
    if "sdxl" in options:
        require_frozen_encoders(options.sdxl.cache_text_encoder_outputs, network.network_train_unet_only)
    _at_least(network, 1, "network_dim")
    if network.network_dropout is not None and not 0 <= network.network_dropout < 1:
        raise UserError(f"--network_dropout {network.network_dropout} is not in 0 to 1", "give a number such as 0.1")
    extra = len(network.base_weights_multiplier or ()) - len(network.base_weights or ())
    if extra > 0:
        warn_once(f"--base_weights_multiplier has {extra} more numbers than --base_weights has files")
    for text in network.network_args or ():
        if "=" not in text:
            raise UserError(f"--network_args {text!r} has no value", "write it as KEY=VALUE")


def check_model_training(options: Resolved) -> None:
    """Which parts of a model learn, and what cannot go together."""
    config = options.model_training
    _at_least(config, 0, "learning_rate_te", "learning_rate_te1", "learning_rate_te2")
    _at_least(config, 1, "fused_optimizer_groups")
    block_rates(config.block_lr)
    if "sdxl" in options and options.sdxl.cache_text_encoder_outputs and config.train_text_encoder:
        raise UserError(
            "--cache_text_encoder_outputs with --train_text_encoder", "leave one of them out: cached text cannot learn"
        )
    if config.no_token_padding and options.model.max_token_length not in (None, 75):
        raise UserError(
            f"--no_token_padding with --max_token_length {options.model.max_token_length}", "leave one of them out"
        )


def check_embedding(options: Resolved) -> None:
    """The word, its vectors, and what they start from."""
    config = options.embedding
    if "token_string" in find_script(options.script).required and not (config.token_string or "").strip():
        raise UserError("--token_string missing", "give the word that is to be learned, one that no language has")
    if options.saving.output_name is None and set(config.token_string or "") & set("/\\"):
        raise UserError(f"--token_string {config.token_string} cannot be a file name", "give --output_name")
    _at_least(config, 1, "num_vectors_per_token")
    if config.init_word is not None and not config.init_word.strip():
        raise UserError("--init_word is empty", "name one or more words to start from, or leave the option out")


def check_conversion(options: Resolved) -> None:
    """Choices of the old command line that are made by the model itself."""
    if options.model_convert.unet_use_linear_projection:
        warn_once("--unet_use_linear_projection has no effect: folders of Stable Diffusion 2.x always get them")


def _at_least(config: Any, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise UserError(f"--{name} {value} is below {low}", f"give {low} or more, or leave it out")


def _share(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name} {getattr(config, name)} is not between 0 and 1", "give a share such as 0.1")


_CHECKS = (
    ("model", check_model),
    ("dataset", check_data),
    ("network", check_network),
    ("model_training", check_model_training),
    ("embedding", check_embedding),
    ("loop", check_length),
    ("optimizer", check_optimizer),
    ("optimizer", check_updates),
    ("objective", check_objective),
    ("precision", check_precision),
    ("saving", check_saving),
    ("samples", check_samples),
    ("validation", check_validation),
    ("ema", check_ema),
    ("logging", check_logging),
    ("model_convert", check_conversion),
)
