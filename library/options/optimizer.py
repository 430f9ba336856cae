"""Optimizer, learning rate and its schedule."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option
from library.options.values import int_or_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Optimizer, learning rate and its schedule."""

    optimizer_type: str = option("", "optimizer by name, or a class as package.module.Class; AdamW when left out")
    optimizer_args: list[str] | None = option(
        None, "arguments of the optimizer as KEY=VALUE with Python literals, e.g. weight_decay=0.01 betas=0.9,0.99"
    )
    use_8bit_adam: bool = option(False, "old form of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "old form of --optimizer_type Lion")
    learning_rate: float = option(2e-06, "learning rate of all parts that have none of their own")
    max_grad_norm: float = option(1.0, "largest norm of the gradient, longer ones are scaled down (0 = no limit)")
    lr_scheduler: str = option("constant", "how the learning rate changes over the run, by name")
    lr_scheduler_type: str = option(
        "", "class of a schedule as Class of torch.optim.lr_scheduler or package.module.Class; replaces --lr_scheduler"
    )
    lr_scheduler_args: list[str] | None = option(None, "arguments of the schedule as KEY=VALUE with Python literals")
    lr_warmup_steps: int | float = option(
        0,
        "updates over which the rate rises from 0: a whole number, or a share of the run such as 0.1 or 10%",
        type=int_or_ratio,
    )
    lr_decay_steps: int | float = option(
        0,
        "last updates over which warmup_stable_decay falls: a whole number, or a share of the run such as 0.1 or 10%",
        type=int_or_ratio,
    )
    lr_scheduler_num_cycles: int = option(1, "number of cosine cycles, for the schedules that restart")
    lr_scheduler_power: float = option(1, "power of the polynomial schedule")
    lr_scheduler_timescale: int | None = option(
        None, "timescale in updates of the inverse_sqrt schedule; the warm-up when left out"
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "share of the learning rate, from 0 to 1, that cosine_with_min_lr and warmup_stable_decay end with"
    )
    fused_backward_pass: bool = option(
        False,
        "update each parameter as soon as its gradient is there, to save memory; AdaFactor, AdamW, Lion or SGDNesterov,"
        " without accumulation and fp16",
    )
