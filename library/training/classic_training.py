"""Functions around optimizer, files and logs as other programs call them, with a script's namespace.

Nothing inside uses these.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.messages import log
from library.options.declare import from_namespace
from library.options.hub import HubConfig
from library.options.logging import LoggingConfig
from library.options.optimizer import OptimizerConfig
from library.options.saving import SavingConfig
from library.training import saving
from library.training.hub import Uploads, download_state
from library.training.metrics import rate_logs
from library.training.model_parts import block_parts
from library.training.optimizers import make_optimizer
from library.training.schedules import make_lr_schedule
from library.training.trackers import loggable_options, start_trackers


def get_optimizer(args: Any, trainable_params: Any) -> tuple[str, str, Any]:
    """(name, arguments as text, optimizer); Adafactor's changes are written back to `args`."""
    # a loop of others that updates in its backward pass does so itself
    config = replace(from_namespace(OptimizerConfig, args), fused_backward_pass=False)
    built = make_optimizer(trainable_params, config)
    effective = built.effective_config
    if effective.lr_scheduler != getattr(args, "lr_scheduler", effective.lr_scheduler):
        args.learning_rate, args.lr_scheduler = effective.learning_rate, effective.lr_scheduler
    if built.ignores_group_rates:
        args.unet_lr = args.text_encoder_lr = None
    return built.name, built.args_text, built.optimizer


def get_scheduler_fix(args: Any, optimizer: Any, num_processes: int) -> Any:
    """The schedule of a loop whose Accelerator steps it once per process and update."""
    config = from_namespace(OptimizerConfig, args)
    return make_lr_schedule(optimizer, config, args.max_train_steps, steps_per_update=num_processes)


def get_epoch_ckpt_name(args: Any, ext: str, epoch_no: int) -> str:
    """Name of the file of an epoch, from 1."""
    return saving.epoch_name(args.output_name, epoch_no, ext)


def get_step_ckpt_name(args: Any, ext: str, step_no: int) -> str:
    """Name of the file of a step."""
    return saving.step_name(args.output_name, step_no, ext)


def get_last_ckpt_name(args: Any, ext: str) -> str:
    """Name of the final file."""
    return saving.last_name(args.output_name, ext)


def get_remove_epoch_no(args: Any, epoch_no: int) -> int | None:
    """Epoch whose file goes after this one was saved."""
    return saving.oldest_epoch_to_go(from_namespace(SavingConfig, args), epoch_no)


def get_remove_step_no(args: Any, step_no: int) -> int | None:
    """Step whose file goes after this one was saved."""
    return saving.oldest_step_to_go(from_namespace(SavingConfig, args), step_no)


def save_sd_model_on_epoch_end_or_stepwise_common(
    args: Any,
    on_epoch_end: bool,
    accelerator: Any,
    save_stable_diffusion_format: bool,
    use_safetensors: bool,
    epoch: int,
    num_train_epochs: int,
    global_step: int,
    sd_saver: Callable[[str, int, int], None],
    diffusers_saver: Callable[[str], None],
) -> None:
    """Save a model after an epoch if one is due, or after a step; the old one and the state follow.

    Args:
        epoch: zero-based.
        sd_saver: (file, epoch number, step); diffusers_saver: (folder).
    """
    config = from_namespace(SavingConfig, args)
    number = epoch + 1 if on_epoch_end else global_step
    if on_epoch_end and not saving.due_after_epoch(config, number, num_train_epochs):
        return
    name = saving.epoch_name if on_epoch_end else saving.step_name
    oldest = saving.oldest_epoch_to_go if on_epoch_end else saving.oldest_step_to_go
    ext = saving.model_extension(use_safetensors) if save_stable_diffusion_format else ""
    path = Path(args.output_dir) / name(config.output_name, number, ext)
    _save_model(
        args, accelerator, path, ext, epoch + 1 if on_epoch_end else epoch, global_step, sd_saver, diffusers_saver
    )
    old = oldest(config, number)
    if old is not None:
        _remove(Path(args.output_dir) / name(config.output_name, old, ext))
    if config.save_state:
        (save_and_remove_state_on_epoch_end if on_epoch_end else save_and_remove_state_stepwise)(
            args, accelerator, number
        )


def save_sd_model_on_train_end_common(
    args: Any,
    save_stable_diffusion_format: bool,
    use_safetensors: bool,
    epoch: int,
    global_step: int,
    sd_saver: Callable[[str, int, int], None],
    diffusers_saver: Callable[[str], None],
) -> None:
    """Save the final model."""
    ext = saving.model_extension(use_safetensors) if save_stable_diffusion_format else ""
    path = Path(args.output_dir) / saving.last_name(args.output_name, ext)
    _save_model(args, None, path, ext, epoch, global_step, sd_saver, diffusers_saver, last=True)


def save_and_remove_state_on_epoch_end(args: Any, accelerator: Any, epoch_no: int) -> None:
    """State folder of an epoch; the one that is too old goes."""
    config = from_namespace(SavingConfig, args)
    old = saving.oldest_epoch_to_go(config, epoch_no, state=True)
    _save_state(args, accelerator, saving.epoch_state_name(config.output_name, epoch_no))
    if old is not None:
        _remove(Path(args.output_dir) / saving.epoch_state_name(config.output_name, old))


def save_and_remove_state_stepwise(args: Any, accelerator: Any, step_no: int) -> None:
    """State folder of a step; the one that is too old goes."""
    config = from_namespace(SavingConfig, args)
    old = saving.oldest_step_to_go(config, step_no, state=True)
    _save_state(args, accelerator, saving.step_state_name(config.output_name, step_no))
    if old:
        _remove(Path(args.output_dir) / saving.step_state_name(config.output_name, old))


def save_state_on_train_end(args: Any, accelerator: Any) -> None:
    """State folder of the end."""
    _save_state(args, accelerator, saving.last_state_name(args.output_name))


def resume_from_local_or_hf_if_specified(accelerator: Any, args: Any) -> None:
    """Load the state that `--resume` names, from this machine or the hub."""
    if not args.resume:
        return
    folder = args.resume
    if getattr(args, "resume_from_huggingface", False):
        folder = str(download_state(args.resume, getattr(args, "huggingface_token", None)))
    log.info("resuming from %s", folder)
    accelerator.load_state(folder)


def append_lr_to_logs(
    logs: dict[str, Any], lr_scheduler: Any, optimizer_type: str, including_unet: bool = True
) -> None:
    """Add the rates of U-Net and text encoders, one group each."""
    names = ["unet"] * including_unet + ["text_encoder1", "text_encoder2"]
    append_lr_to_logs_with_names(logs, lr_scheduler, optimizer_type, names)


def append_lr_to_logs_with_names(
    logs: dict[str, Any], lr_scheduler: Any, optimizer_type: str, names: list[str]
) -> None:
    """Add `lr/<name>` of each group, and for adaptive optimizers `lr/d*lr/<name>`."""
    rates = lr_scheduler.get_last_lr()
    optimizers = getattr(lr_scheduler, "optimizers", None) or [getattr(lr_scheduler, "optimizer", None)]
    logs.update(rate_logs(rates, names[: len(rates)]))
    for name, group in zip(names, getattr(optimizers[-1], "param_groups", ()), strict=False):
        if "d" in group:
            logs[f"lr/d*lr/{name}"] = group["d"] * group["lr"]


def get_block_params_to_optimize(unet: Any, block_lrs: list[float]) -> list[dict[str, Any]]:
    """Optimizer groups of an SDXL U-Net's 23 blocks; blocks with rate 0 are left out."""
    return [{"params": list(part.parameters), "lr": part.rate} for part in block_parts(unet, block_lrs)]


def append_block_lr_to_logs(
    block_lrs: list[float], logs: dict[str, Any], lr_scheduler: Any, optimizer_type: str
) -> None:
    """Add `lr/block<i>` of each block with a rate above 0, then the rates of the text encoders."""
    names = [f"block{number}" for number, rate in enumerate(block_lrs) if rate] + ["text_encoder1", "text_encoder2"]
    append_lr_to_logs_with_names(logs, lr_scheduler, optimizer_type, names)


def init_trackers(accelerator: Any, args: Any, default_tracker_name: str) -> None:
    """Open the trackers on the main process."""
    start_trackers(accelerator, from_namespace(LoggingConfig, args), default_tracker_name, vars(args))


def get_sanitized_config_or_none(args: Any) -> dict[str, Any] | None:
    """The options as trackers log them, with `--log_config`."""
    return loggable_options(vars(args)) if getattr(args, "log_config", False) else None


def upload(args: Any, src: str | Path, dest_suffix: str = "", force_sync_upload: bool = False) -> None:
    """Send a file or folder to the repository of the namespace.

    Args:
        dest_suffix: where in the repository, after `--huggingface_path_in_repo`; "" = the path's own name.
    """
    uploads = Uploads(from_namespace(HubConfig, args))
    uploads.send(src, last=force_sync_upload, name=dest_suffix.strip("/") or None)


def fire_in_thread(f: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call `f` in a thread that keeps the program alive until it is done."""
    threading.Thread(target=f, args=args, kwargs=kwargs).start()


def _save_model(
    args: Any,
    accelerator: Any,
    path: Path,
    ext: str,
    epoch_no: int,
    step: int,
    sd_saver: Callable[[str, int, int], None],
    diffusers_saver: Callable[[str], None],
    last: bool = False,
) -> None:
    os.makedirs(args.output_dir, exist_ok=True)
    # Callers look for these two words to count what was written.
    (accelerator.print if accelerator is not None else log.info)(f"saving checkpoint: {path}")
    if ext:
        sd_saver(str(path), epoch_no, step)
    else:
        path.mkdir(exist_ok=True)
        diffusers_saver(str(path))
    Uploads(from_namespace(HubConfig, args)).send(path, last=last)


def _save_state(args: Any, accelerator: Any, name: str) -> None:
    folder = Path(args.output_dir) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.info("saving the state %s", folder)
    accelerator.save_state(str(folder))
    Uploads(from_namespace(HubConfig, args)).send_state(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
