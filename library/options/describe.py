"""The effective settings of a training run, as lines of text for the block before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.options.effects import without_effect
from library.options.registries import find_optimizer

if TYPE_CHECKING:
    from library.options.parser import Resolved


def describe(options: Resolved) -> list[str]:
    """What the options mean for this run: `what: value` lines, then the options without effect.

    What depends on data and model (pictures, epochs, parameters) is added by those who know it.
    """
    lines = [f"{what}: {text}" for what, text in _settings(options) if text]
    lines += [f"no effect here: --{name} ({reason})" for name, reason in without_effect(options)]
    return lines


def _settings(options: Resolved) -> list[tuple[str, str]]:
    return [
        ("model", _model(options)),
        ("network", _network(options)),
        ("learning rates", _rates(options)),
        ("optimizer", _optimizer(options)),
        ("schedule", _schedule(options)),
        ("batch", _batch(options)),
        ("length", _length(options)),
        ("objective", _objective(options)),
        ("precision", _precision(options)),
        ("result", _result(options)),
        ("sample pictures", _samples(options)),
        ("validation", _validation(options)),
        ("moving average", _average(options)),
    ]


def _model(options: Resolved) -> str:
    model = options.model
    parts = [str(model.pretrained_model_name_or_path)]
    parts.append("SDXL" if "sdxl" in options else "SD 2.x" if model.v2 else "SD 1.x")
    parts.append("velocity" if model.v_parameterization else "noise prediction")
    if model.vae:
        parts.append(f"VAE {model.vae}")
    if model.clip_skip:
        parts.append(f"clip skip {model.clip_skip}")
    return ", ".join(parts)


def _network(options: Resolved) -> str:
    if "network" not in options:
        return ""
    network = options.network
    rank = "from the weights" if network.dim_from_weights else network.network_dim or "the module's default"
    parts = [str(network.network_module), f"rank {rank}", f"alpha {network.network_alpha:g}"]
    parts += network.network_args or []
    if network.network_weights:
        parts.append(f"from {network.network_weights}")
    return ", ".join(parts)


def _rates(options: Resolved) -> str:
    rate = options.optimizer.learning_rate
    if rate is None:
        return "chosen by the optimizer"
    if "network" not in options:
        return f"{rate:g}; of each part: see above"
    network = options.network
    unet = 0 if network.network_train_text_encoder_only else _first(network.unet_lr, rate)
    text = 0 if network.network_train_unet_only else _first(network.text_encoder_lr, rate)
    parts = [("U-Net", unet)]
    if isinstance(text, list):
        parts += [(f"text encoder {number}", value) for number, value in enumerate(text, 1)]
    else:
        parts.append(("text encoder", text))
    return ", ".join(f"{part} {value:g}" if value else f"{part} not trained" for part, value in parts)


def _first(value: Any, otherwise: float) -> Any:
    return otherwise if value is None else value


def _optimizer(options: Resolved) -> str:
    optimizer = options.optimizer
    name = "AdamW8bit" if optimizer.use_8bit_adam else "Lion" if optimizer.use_lion_optimizer else ""
    name = name or optimizer.optimizer_type or "AdamW"
    record = find_optimizer(name)
    parts = [record.name if record else name, *(optimizer.optimizer_args or [])]
    if optimizer.max_grad_norm:
        parts.append(f"gradient norm at most {optimizer.max_grad_norm:g}")
    return ", ".join(parts)


def _schedule(options: Resolved) -> str:
    optimizer = options.optimizer
    parts = [optimizer.lr_scheduler_type or optimizer.lr_scheduler, *(optimizer.lr_scheduler_args or [])]
    if optimizer.lr_warmup_steps:
        parts.append(f"warm-up {_steps(optimizer.lr_warmup_steps)}")
    return ", ".join(parts)


def _steps(value: float) -> str:
    return f"{value} updates" if isinstance(value, int) else f"{value:.4g} of the run"


def _batch(options: Resolved) -> str:
    size, accumulation = options.dataset.train_batch_size, options.loop.gradient_accumulation_steps
    text = f"{size} per device"
    return f"{text}, {accumulation} micro-steps an update" if accumulation > 1 else text


def _length(options: Resolved) -> str:
    loop = options.loop
    length = f"{loop.max_train_epochs} epochs" if loop.max_train_epochs else f"{loop.max_train_steps} updates"
    return f"{length}, going on from {loop.resume}" if loop.resume else length


def _objective(options: Resolved) -> str:
    objective = options.objective
    parts = [f"{objective.loss_type} loss"]
    names = (
        "noise_offset",
        "multires_noise_iterations",
        "ip_noise_gamma",
        "min_snr_gamma",
        "v_pred_like_loss",
        "min_timestep",
        "max_timestep",
    )
    parts += [f"{name} {getattr(objective, name):g}" for name in names if getattr(objective, name)]
    flags = ("zero_terminal_snr", "scale_v_pred_loss_like_noise_pred", "debiased_estimation_loss", "masked_loss")
    return ", ".join([*parts, *(name for name in flags if getattr(objective, name))])


def _precision(options: Resolved) -> str:
    precision = options.precision
    parts = ["float32" if precision.mixed_precision == "no" else precision.mixed_precision]
    flags = ("full_fp16", "full_bf16", "fp8_base", "fp8_base_unet", "gradient_checkpointing", "torch_compile")
    parts += [name for name in flags if getattr(precision, name)]
    attention = "xformers" if precision.xformers and not precision.mem_eff_attn else "sdpa"
    return ", ".join([*parts, f"attention {attention}"])


def _result(options: Resolved) -> str:
    saving = options.saving
    parts = [
        f"{saving.output_dir}/{saving.output_name or 'last'}, {saving.save_model_as or 'in the form of the source'}"
    ]
    if saving.save_precision:
        parts.append(saving.save_precision)
    for unit in ("epochs", "steps"):
        every = getattr(saving, f"save_every_n_{unit}")
        if every:
            parts.append(f"every {every} {unit}")
    if saving.save_state:
        parts.append("with state")
    return ", ".join(parts)


def _samples(options: Resolved) -> str:
    samples = options.samples
    if samples.sample_every_n_epochs:
        return f"every {samples.sample_every_n_epochs} epochs, {samples.sample_sampler}"
    if samples.sample_every_n_steps:
        return f"every {samples.sample_every_n_steps} steps, {samples.sample_sampler}"
    return ""


def _validation(options: Resolved) -> str:
    config = options.validation
    if not options.dataset.validation_split:
        return ""
    parts = [f"{options.dataset.validation_split:g} of the pictures"]
    if config.validate_every_n_steps:
        parts.append(f"every {config.validate_every_n_steps} steps")
    if config.validate_every_n_epochs or not config.validate_every_n_steps:
        parts.append(f"every {config.validate_every_n_epochs or 1} epochs")
    return ", ".join(parts)


def _average(options: Resolved) -> str:
    ema = options.ema
    if ema.ema_decay is None:
        return ""
    return f"decay {ema.ema_decay:g}" + (f", from step {ema.ema_start}" if ema.ema_start else "")
