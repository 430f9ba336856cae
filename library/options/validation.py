"""Validation loss on held-out pictures."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Validation loss on held-out pictures."""

    validate_every_n_steps: int | None = option(None, "")
    validate_every_n_epochs: int | None = option(None, "")
    max_validation_steps: int | None = option(None, "")
