"""Training a whole model: which parts learn, at which rates, and how the result is written."""

from __future__ import annotations

from dataclasses import dataclass

from library.messages import UserError
from library.options.declare import option

UNET_BLOCKS = 23


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTrainingConfig:
    """Which parts of the model learn, at which rates, and how the result is written."""

    train_text_encoder: bool = option(False, "train the text encoders too")
    stop_text_encoder_training: int | None = option(
        None, "train the text encoder for this many updates only; below 0 never, the whole run when left out"
    )
    learning_rate_te: float | None = option(
        None, "learning rate of the text encoder; --learning_rate when left out, 0 leaves it as it is"
    )
    learning_rate_te1: float | None = option(
        None, "learning rate of the first text encoder; --learning_rate when left out, 0 leaves it as it is"
    )
    learning_rate_te2: float | None = option(
        None, "learning rate of the second text encoder; --learning_rate when left out, 0 leaves it as it is"
    )
    block_lr: str | None = option(
        None,
        f"{UNET_BLOCKS} learning rates for the blocks of the U-Net, separated by commas; 0 leaves a block as it is",
    )
    fused_optimizer_groups: int | None = option(
        None,
        "number of optimizers that share the parameters; each updates its own in the backward pass, to save memory",
    )
    no_token_padding: bool = option(False, "fill captions up to the longest of their batch only, not to 77 tokens")
    diffusers_xformers: bool = option(False, "old name of --xformers")
    use_safetensors: bool = option(
        False, "write safetensors files where --save_model_as does not say so; the format stays that of the source"
    )


def block_rates(text: str | None) -> list[float] | None:
    """The rates of `--block_lr`, or None without it.

    Raises:
        UserError: not 23 numbers of 0 or more.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    try:
        rates = [float(part) for part in parts]
    except ValueError:
        bad = next(part for part in parts if not _is_number(part))
        raise UserError(f"--block_lr: {bad!r} is not a number", "write 23 numbers separated by commas") from None
    if len(rates) != UNET_BLOCKS:
        raise UserError(f"--block_lr has {len(rates)} numbers", f"give {UNET_BLOCKS}, one for each block of the U-Net")
    if min(rates) < 0:
        raise UserError(f"--block_lr: {min(rates)} is negative", "give 0 or more")
    return rates


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
