"""Trackers and console."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Trackers and console."""

    logging_dir: str | None = option(None, "")
    log_with: str | None = option(None, "", choices=("tensorboard", "wandb", "all"))
    log_prefix: str | None = option(None, "")
    log_tracker_name: str | None = option(None, "")
    log_tracker_config: str | None = option(None, "")
    log_config: bool = option(False, "")
    wandb_api_key: str | None = option(None, "")
    wandb_run_name: str | None = option(None, "")
    console_log_level: str | None = option(None, "", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    console_log_file: str | None = option(None, "")
    console_log_simple: bool = option(False, "")
