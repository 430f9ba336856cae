"""Validation loss on held-out pictures."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Validation loss on held-out pictures."""

    validate_every_n_steps: int | None = option(
        None, "compute the validation loss every N updates; needs --validation_split"
    )
    validate_every_n_epochs: int | None = option(
        None, "compute the validation loss every N epochs; every epoch when both are left out"
    )
    max_validation_steps: int | None = option(None, "validation batches at most; all when left out")
