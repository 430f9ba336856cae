"""Optimizer, learning rate and its schedule."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Optimizer, learning rate and its schedule."""

    optimizer_type: str = option("", "")
    optimizer_args: list[str] | None = option(None, "")
    use_8bit_adam: bool = option(False, "")
    use_lion_optimizer: bool = option(False, "")
    learning_rate: float = option(2e-06, "")
    max_grad_norm: float = option(1.0, "")
    lr_scheduler: str = option("constant", "")
    lr_scheduler_type: str = option("", "")
    lr_scheduler_args: list[str] | None = option(None, "")
    lr_warmup_steps: int = option(0, "")
    lr_decay_steps: float = option(0, "")
    lr_scheduler_num_cycles: int = option(1, "")
    lr_scheduler_power: float = option(1, "")
    lr_scheduler_timescale: int | None = option(None, "")
    lr_scheduler_min_lr_ratio: float | None = option(None, "")
    fused_backward_pass: bool = option(False, "")
