"""Sample pictures while training."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """Sample pictures while training."""

    sample_every_n_steps: int | None = option(None, "")
    sample_every_n_epochs: int | None = option(None, "")
    sample_at_first: bool = option(False, "")
    sample_prompts: str | None = option(None, "")
    sample_sampler: str = option(
        "ddim",
        "",
        choices=(
            "ddim",
            "pndm",
            "lms",
            "euler",
            "euler_a",
            "heun",
            "dpm_2",
            "dpm_2_a",
            "dpmsolver",
            "dpmsolver++",
            "dpmsingle",
            "k_lms",
            "k_euler",
            "k_euler_a",
            "k_dpm_2",
            "k_dpm_2_a",
        ),
    )
