"""Trackers of loss and rates."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Trackers of loss and rates."""

    logging_dir: str | None = option(None, "folder for logs; switches tensorboard on when --log_with is left out")
    log_with: str | None = option(
        None, "where values are logged: tensorboard, wandb or all", choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str | None = option(None, "text before the time in the name of the log folder")
    log_tracker_name: str | None = option(None, "name of the run's group in the logs; network_train when left out")
    log_tracker_config: str | None = option(None, 'TOML file with arguments per tracker, e.g. [wandb] name = "x"')
    log_config: bool = option(False, "log the options too, without tokens and paths")
    no_report: bool = option(False, "do not write <output_name>-report.html, the page about the run, at its end")
    wandb_api_key: str | None = option(None, "wandb key; `wandb login` keeps it out of the command line")
    wandb_run_name: str | None = option(None, "name of the run in wandb")
