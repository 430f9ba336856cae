"""Length of the run, seed, loader and resume."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Length of the run, seed, loader and resume."""

    max_train_steps: int = option(1600, "")
    max_train_epochs: int | None = option(None, "")
    gradient_accumulation_steps: int = option(1, "")
    seed: int | None = option(None, "")
    max_data_loader_n_workers: int = option(8, "")
    persistent_data_loader_workers: bool = option(False, "")
    resume: str | None = option(None, "")
    initial_epoch: int | None = option(None, "")
    initial_step: int | None = option(None, "")
    skip_until_initial_step: bool = option(False, "")
