"""Sample pictures while training."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option
from library.options.registries import SAMPLER_NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """Sample pictures while training."""

    sample_every_n_steps: int | None = option(None, "draw sample pictures every N updates; needs --sample_prompts")
    sample_every_n_epochs: int | None = option(
        None, "draw sample pictures every N epochs; replaces --sample_every_n_steps"
    )
    sample_at_first: bool = option(False, "draw sample pictures before the first step too")
    sample_prompts: str | None = option(None, "file of prompts: .txt (one a line), .toml or .json")
    sample_sampler: str = option(
        "ddim",
        "sampler of the sample pictures",
        choices=SAMPLER_NAMES,
    )
