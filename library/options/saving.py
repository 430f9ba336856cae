"""What is written, when, and how long it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class SavingConfig:
    """What is written, when, and how long it is kept."""

    output_dir: str | None = option(None, "")
    output_name: str | None = option(None, "")
    save_precision: str | None = option(None, "", choices=(None, "float", "fp16", "bf16"))
    save_model_as: str = option("safetensors", "", choices=(None, "ckpt", "pt", "safetensors"))
    save_every_n_epochs: int | None = option(None, "")
    save_every_n_steps: int | None = option(None, "")
    save_n_epoch_ratio: int | None = option(None, "")
    save_last_n_epochs: int | None = option(None, "")
    save_last_n_steps: int | None = option(None, "")
    save_state: bool = option(False, "")
    save_state_on_train_end: bool = option(False, "")
    save_last_n_epochs_state: int | None = option(None, "")
    save_last_n_steps_state: int | None = option(None, "")
