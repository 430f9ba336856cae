"""What is written, when, and how long it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class SavingConfig:
    """What is written, when, and how long it is kept."""

    output_dir: str | None = option(None, "folder for everything that the run writes; made when missing")
    output_name: str | None = option(None, "name of the written files without ending; last, epoch and at when left out")
    save_precision: str | None = option(
        None,
        "number format of the written weights: float, fp16 or bf16; as trained when left out",
        choices=(None, "float", "fp16", "bf16"),
    )
    save_model_as: str = option("safetensors", "file format of the result", choices=(None, "ckpt", "pt", "safetensors"))
    save_every_n_epochs: int | None = option(None, "write the result every N epochs too")
    save_every_n_steps: int | None = option(None, "write the result every N updates too")
    save_n_epoch_ratio: int | None = option(
        None, "write the result about N times in the run, at ends of epochs; replaces --save_every_n_epochs"
    )
    save_last_n_epochs: int | None = option(
        None, "keep only the files of the last N epochs; needs --save_every_n_epochs"
    )
    save_last_n_steps: int | None = option(
        None, "keep only the files of the last N updates; needs --save_every_n_steps"
    )
    save_state: bool = option(False, "write the state with every result, to go on with --resume")
    save_state_on_train_end: bool = option(False, "write the state at the end of the run only")
    save_last_n_epochs_state: int | None = option(
        None, "keep only the states of the last N epochs; --save_last_n_epochs when left out"
    )
    save_last_n_steps_state: int | None = option(
        None, "keep only the states of the last N updates; --save_last_n_steps when left out"
    )
