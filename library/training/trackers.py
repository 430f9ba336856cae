"""Where a run's values go: tensorboard, wandb, or every tracker that accelerate finds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toml

from library.messages import UserError, log

if TYPE_CHECKING:
    from library.options.logging import LoggingConfig

# Never logged: secrets, and paths that say something about the user's machine.
PRIVATE_OPTIONS = frozenset(
    {
        "wandb_api_key",
        "huggingface_token",
        "pretrained_model_name_or_path",
        "vae",
        "tokenizer_cache_dir",
        "train_data_dir",
        "reg_data_dir",
        "conditioning_data_dir",
        "in_json",
        "dataset_config",
        "output_dir",
        "logging_dir",
        "log_tracker_config",
        "config_file",
        "network_weights",
        "base_weights",
        "sample_prompts",
        "resume",
    }
)


@dataclass(frozen=True, slots=True)
class TrackerChoice:
    """What the Accelerator is made with.

    Attributes:
        log_with: `tensorboard`, `wandb`, `all`, or None for no tracker.
        project_dir: folder of this run's logs, or None.
    """

    log_with: str | None
    project_dir: str | None


def choose_trackers(config: LoggingConfig, now: time.struct_time | None = None) -> TrackerChoice:
    """Which trackers the options ask for; signs in to wandb when a key is given.

    Args:
        now: local time of the start, part of the folder's name.

    Raises:
        UserError: no folder for tensorboard, or wandb is not installed.
    """
    folder = None
    if config.logging_dir:
        stamp = time.strftime("%Y%m%d%H%M%S", now or time.localtime())
        folder = f"{config.logging_dir}/{config.log_prefix or ''}{stamp}"
    elif config.log_with in ("tensorboard", "all"):
        raise UserError(f"--log_with {config.log_with} needs a folder", "give --logging_dir")
    log_with = config.log_with or ("tensorboard" if folder else None)
    if log_with == "wandb" or (log_with == "all" and config.wandb_api_key):
        _prepare_wandb(config)
    return TrackerChoice(log_with, folder)


def start_trackers(
    accelerator: Any, config: LoggingConfig, default_name: str, options: Mapping[str, Any] | None = None
) -> None:
    """Open the trackers on the main process.

    Args:
        accelerator: made with what `choose_trackers` gave.
        default_name: of the tracker when `--log_tracker_name` is left out, e.g. `network_train`.
        options: the run's options by name, logged with `--log_config`.

    Raises:
        UserError: `--log_tracker_config` cannot be read.
    """
    if not accelerator.is_main_process:
        return
    arguments = _tracker_arguments(config)
    shown = loggable_options(options or {}) if config.log_config else None
    accelerator.init_trackers(config.log_tracker_name or default_name, config=shown, init_kwargs=arguments)


def log_picture(accelerator: Any, name: str, path: Path, prompt: str, average: bool = False) -> None:
    """Show a sample picture in wandb, where it is a tracker of this run; it goes out with the next values.

    Args:
        name: under which pictures of one prompt stand together.
        average: it was drawn with the moving average of the weights.
    """
    for tracker in getattr(accelerator, "trackers", ()):
        if getattr(tracker, "name", None) != "wandb":
            continue
        try:
            import wandb

            tracker.log({name + "_ema" * average: wandb.Image(str(path), caption=prompt)}, commit=False)
        except Exception as error:  # a picture that is not shown must not end a training
            log.warning("%s was not sent to wandb (%s: %s)", path.name, type(error).__name__, error)


def loggable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as trackers take them: numbers, texts, flags; without secrets and paths."""
    public = {name: value for name, value in options.items() if name not in PRIVATE_OPTIONS and value is not None}
    return {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in public.items()}


def _tracker_arguments(config: LoggingConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if config.wandb_run_name:
        arguments["wandb"] = {"name": config.wandb_run_name}
    if config.log_tracker_config:
        path = Path(config.log_tracker_config)
        try:
            for tracker, table in toml.loads(path.read_text(encoding="utf-8-sig")).items():
                arguments[tracker] = {**arguments.get(tracker, {}), **table}
        except (OSError, toml.TomlDecodeError, TypeError) as error:
            raise UserError(
                f"--log_tracker_config {path} cannot be read ({error})", 'write tables such as [wandb] name = "x"'
            ) from error
    return arguments


def _prepare_wandb(config: LoggingConfig) -> None:
    try:
        import wandb
    except ImportError:
        raise UserError(f"--log_with {config.log_with} needs the package wandb", "pip install wandb") from None
    if config.logging_dir:
        os.makedirs(config.logging_dir, exist_ok=True)
        os.environ["WANDB_DIR"] = config.logging_dir
    if config.wandb_api_key:
        wandb.login(key=config.wandb_api_key)
