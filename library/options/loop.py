"""Length of the run, seed, loader and resume."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Length of the run, seed, loader and resume."""

    max_train_steps: int = option(1600, "optimizer updates of the whole run; --max_train_epochs replaces it")
    max_train_epochs: int | None = option(None, "epochs of the whole run; replaces --max_train_steps")
    gradient_accumulation_steps: int = option(1, "micro-steps whose gradients make one update")
    seed: int | None = option(None, "seed of the whole run; drawn and shown when left out")
    max_data_loader_n_workers: int = option(
        8, "processes that read pictures, at most the machine's cores (0 = the main process reads)"
    )
    persistent_data_loader_workers: bool = option(False, "keep the reading processes between epochs")
    resume: str | None = option(None, "state folder of an earlier run; it goes on exactly where that one stopped")
    initial_epoch: int | None = option(None, "number of the first epoch, from 1, without a saved state")
    initial_step: int | None = option(
        None, "number of updates counted as done, without a saved state; replaces --initial_epoch"
    )
    skip_until_initial_step: bool = option(
        False, "skip the batches before the initial step instead of only counting on from it"
    )
    dry_run: bool = option(False, "show the effective settings and stop before the first step")
