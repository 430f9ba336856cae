"""Learning-rate schedules by name, as factors of the rate. Everything counts in optimizer updates."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.messages import UserError
from library.options.registries import SCHEDULES, find_schedule, nearest
from library.options.values import key_values, resolve_ratio
from library.training.optimizers import is_schedule_free

if TYPE_CHECKING:
    import torch

    from library.options.optimizer import OptimizerConfig

Factor = Callable[[float], float]
ADAFACTOR = "adafactor"


def make_lr_schedule(
    optimizer: torch.optim.Optimizer,
    config: OptimizerConfig,
    max_train_steps: int,
    *,
    steps_per_update: int = 1,
) -> LRScheduler:
    """The schedule that the options name; `step()` it once per optimizer update.

    Args:
        optimizer: from `make_optimizer`.
        config: the effective options (`Built.effective_config`).
        max_train_steps: optimizer updates of the whole run.
        steps_per_update: calls of `step()` per update, for loops of others that make several.

    Raises:
        UserError: unknown schedule, wrong or missing arguments, a warm-up where none is possible.
    """
    if is_schedule_free(config):
        return MirrorSchedule(optimizer, group_rate)
    if config.lr_scheduler_type:
        return _class_schedule(optimizer, config)
    if config.lr_scheduler.startswith(ADAFACTOR):
        return _adafactor_schedule(optimizer, config)
    factor = make_factor(config, max_train_steps)
    return LambdaLR(optimizer, lambda step: factor(step / steps_per_update))


def make_factor(config: OptimizerConfig, total: int) -> Factor:
    """The factor f(s) of the rate after s of `total` updates."""
    name = config.lr_scheduler
    if name not in FACTORS:
        known = [record.name for record in SCHEDULES]
        near = nearest(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
        raise UserError(f"unknown --lr_scheduler {name!r}", hint)
    arguments = key_values(config.lr_scheduler_args, "--lr_scheduler_args")
    warmup = _warmup_steps(config, total)
    maker = FACTORS[name]
    known = [p for p in inspect.signature(maker).parameters if p not in ("config", "warmup", "total")]
    unknown = [key for key in arguments if key not in known]
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise UserError(f"--lr_scheduler_args {unknown[0]}: {name} has no such argument", takes)
    return maker(config, warmup, total, **arguments)


def _warmup_steps(config: OptimizerConfig, total: int) -> int:
    if config.lr_warmup_steps is None:
        record = find_schedule(config.lr_scheduler)
        if record is not None and "lr_warmup_steps" in record.takes:
            raise UserError(f"--lr_scheduler {config.lr_scheduler} needs lr_warmup_steps", "set it to 0 or more")
        return 0
    return resolve_ratio(config.lr_warmup_steps, total)


def constant(config: OptimizerConfig, warmup: int, total: int) -> Factor:
    """1."""
    if warmup:
        raise UserError(
            "--lr_scheduler constant has no warm-up", "use constant_with_warmup or leave --lr_warmup_steps at 0"
        )
    return lambda step: 1.0


def constant_with_warmup(config: OptimizerConfig, warmup: int, total: int) -> Factor:
    """Rises, then 1."""
    return _after_warmup(warmup, lambda step: 1.0)


def linear(config: OptimizerConfig, warmup: int, total: int) -> Factor:
    """Falls in a straight line to 0."""
    return _after_warmup(warmup, lambda step: max(0.0, (total - step) / max(1, total - warmup)))


def cosine(config: OptimizerConfig, warmup: int, total: int, num_cycles: float = 0.5) -> Factor:
    """Falls along `num_cycles` turns of a cosine, half a turn by default."""
    progress = partial(_progress, warmup=warmup, total=total)
    return _after_warmup(warmup, lambda step: max(0.0, _cosine(2 * num_cycles * progress(step))))


def cosine_with_restarts(config: OptimizerConfig, warmup: int, total: int, num_cycles: int | None = None) -> Factor:
    """Falls along a cosine and jumps back to 1, `num_cycles` times in all."""
    cycles = config.lr_scheduler_num_cycles if num_cycles is None else num_cycles

    def factor(step: float) -> float:
        progress = _progress(step, warmup, total)
        return 0.0 if progress >= 1 else max(0.0, _cosine(cycles * progress % 1.0))

    return _after_warmup(warmup, factor)


def polynomial(
    config: OptimizerConfig, warmup: int, total: int, lr_end: float = 1e-7, power: float | None = None
) -> Factor:
    """Falls from the learning rate to `lr_end` along a power."""
    rate = config.learning_rate
    exponent = config.lr_scheduler_power if power is None else power
    if rate is None or rate <= lr_end:
        raise UserError(
            f"--lr_scheduler polynomial falls to lr_end {lr_end}, which is not below the learning rate {rate}",
            "raise --learning_rate or set --lr_scheduler_args lr_end=...",
        )

    def factor(step: float) -> float:
        if step > total:
            return lr_end / rate
        left = 1 - (step - warmup) / max(1, total - warmup)
        return ((rate - lr_end) * left**exponent + lr_end) / rate

    return _after_warmup(warmup, factor)


def piecewise_constant(config: OptimizerConfig, warmup: int, total: int, step_rules: str | None = None) -> Factor:
    """A staircase: `1:5,0.1:12,0.01` is 1 before update 5, 0.1 before update 12, then 0.01."""
    example = "write --lr_scheduler_args \"step_rules='1:5,0.1:12,0.01'\""
    if step_rules is None:
        raise UserError("--lr_scheduler piecewise_constant needs step_rules", example)
    try:
        *stairs, last = str(step_rules).split(",")
        limits = [(int(stair.split(":")[1]), float(stair.split(":")[0])) for stair in stairs]
        final = float(last)
    except (ValueError, IndexError):
        raise UserError(f"--lr_scheduler_args step_rules: {step_rules!r} is not a list of steps", example) from None
    return lambda step: next((value for limit, value in limits if step < limit), final)


def cosine_with_min_lr(
    config: OptimizerConfig,
    warmup: int,
    total: int,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    num_cycles: float | None = None,
) -> Factor:
    """Falls along a cosine to a share of the rate."""
    floor = config.lr_scheduler_min_lr_ratio if min_lr_rate is None else min_lr_rate
    if (floor is None) == (min_lr is None):
        raise UserError(
            "--lr_scheduler cosine_with_min_lr needs exactly one lowest rate",
            "give --lr_scheduler_min_lr_ratio 0.1 or --lr_scheduler_args min_lr=1e-5",
        )
    share = floor if floor is not None else (min_lr or 0.0) / (config.learning_rate or 1.0)
    turns = config.lr_scheduler_num_cycles if num_cycles is None else 2 * num_cycles
    progress = partial(_progress, warmup=warmup, total=total)
    return _after_warmup(warmup, lambda step: max(0.0, _between(share, _cosine(turns * progress(step)))))


def inverse_sqrt(config: OptimizerConfig, warmup: int, total: int, timescale: int | None = None) -> Factor:
    """Falls with the square root of the step."""
    scale = timescale or config.lr_scheduler_timescale or warmup or 10_000
    return _after_warmup(warmup, lambda step: 1 / math.sqrt((step - warmup + scale) / scale))


def warmup_stable_decay(
    config: OptimizerConfig,
    warmup: int,
    total: int,
    decay_type: str = "cosine",
    warmup_type: str = "linear",
    min_lr_ratio: float | None = None,
    num_cycles: float | None = None,
) -> Factor:
    """Rises, stays at 1, and falls in the last `--lr_decay_steps` updates."""
    floor = (config.lr_scheduler_min_lr_ratio if min_lr_ratio is None else min_lr_ratio) or 0.0
    decay = resolve_ratio(config.lr_decay_steps or 0, total)
    turns = config.lr_scheduler_num_cycles if num_cycles is None else 2 * num_cycles
    stable = total - decay
    rise, fall = _shape(RISES, warmup_type, "warmup_type"), _shape(FALLS, decay_type, "decay_type")

    def factor(step: float) -> float:
        if step < warmup:
            return max(0.0, _between(floor, rise(step / warmup)))
        if step < stable:
            return 1.0
        if step < total:
            return max(0.0, _between(floor, fall((step - stable) / decay, turns)))
        return floor

    return factor


FACTORS: dict[str, Callable[..., Factor]] = {
    maker.__name__: maker
    for maker in (
        constant,
        constant_with_warmup,
        linear,
        cosine,
        cosine_with_restarts,
        polynomial,
        piecewise_constant,
        cosine_with_min_lr,
        inverse_sqrt,
        warmup_stable_decay,
    )
}
RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 1 - _cosine(p),
    "1-sqrt": lambda p: 1 - math.sqrt(1 - p),
}
FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda p, turns: 1 - p,
    "cosine": lambda p, turns: _cosine(turns * p),
    "1-sqrt": lambda p, turns: 1 - math.sqrt(p),
}


def _after_warmup(warmup: int, factor: Factor) -> Factor:
    return lambda step: step / warmup if step < warmup else factor(step)


def _progress(step: float, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _cosine(half_turns: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * half_turns))


def _between(floor: float, factor: float) -> float:
    return (1 - floor) * factor + floor


def _shape(shapes: dict[str, Any], name: str, argument: str) -> Any:
    if name not in shapes:
        raise UserError(f"--lr_scheduler_args {argument}: {name!r} is unknown", f"choose one of {', '.join(shapes)}")
    return shapes[name]


class MirrorSchedule(LRScheduler):
    """Shows the rates that an optimizer sets itself and changes none.

    Args:
        optimizer: whose rates are shown.
        read: (optimizer, group) -> the group's rate now, a number or a tensor of one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, read: Callable[[Any, dict[str, Any]], Any]) -> None:
        self.optimizer = optimizer
        self.read = read
        self.last_epoch = 0

    def get_last_lr(self) -> list[float]:
        """The rate of each group."""
        return [float(rate) for rate in self.unread_rates()]

    def unread_rates(self) -> list[Any]:
        """The same without asking the device: tensors where the rates lie there."""
        return [self.read(self.optimizer, group) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:
        """The same."""
        return self.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        """Count an update."""
        self.last_epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of updates."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.last_epoch = state_dict["last_epoch"]


def group_rate(optimizer: Any, group: dict[str, Any]) -> float:
    """The rate that stands in the group."""
    return group["lr"]


def adafactor_rate(optimizer: Any, group: dict[str, Any], initial: float) -> Any:
    """The rate Adafactor used for a group's first parameter in its last step, `initial` before the first."""
    state = optimizer.state.get(group["params"][0])
    if not state:
        return initial
    return _plain(optimizer)._get_lr(group, state)


def _plain(optimizer: Any) -> Any:
    """The optimizer itself, or one of those behind one that is made of pieces."""
    return getattr(optimizer, "inner", optimizer)


def _adafactor_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> LRScheduler:
    if type(_plain(optimizer)).__name__ != "Adafactor":
        raise UserError(f"--lr_scheduler {config.lr_scheduler} needs Adafactor", "add --optimizer_type AdaFactor")
    if config.lr_warmup_steps:
        raise UserError(
            "--lr_warmup_steps has no meaning while Adafactor sets its rate", "leave it at 0, or relative_step=False"
        )
    text = config.lr_scheduler.partition(":")[2] or config.learning_rate or 0.0
    try:
        initial = float(text)
    except ValueError:
        raise UserError(f"--lr_scheduler {config.lr_scheduler}: {text!r} is no rate", "write adafactor:1e-3") from None
    return MirrorSchedule(optimizer, partial(adafactor_rate, initial=initial))


def _class_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> LRScheduler:
    """`--lr_scheduler_type`: a class of torch or of any importable module."""
    path = config.lr_scheduler_type
    module_name, _, class_name = path.rpartition(".")
    module_name = module_name or "torch.optim.lr_scheduler"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"--lr_scheduler_type {path}: {error}", "check the module's name or install it") from error
    if not hasattr(module, class_name):
        near = nearest(class_name, [n for n in dir(module) if isinstance(getattr(module, n), type)])
        hint = f"did you mean {' or '.join(near)}?" if near else "check its name"
        raise UserError(f"--lr_scheduler_type: {module_name} has no {class_name}", hint)
    schedule_class = getattr(module, class_name)
    if config.lr_warmup_steps:
        raise UserError(f"--lr_scheduler_type {path} takes no warm-up", "leave --lr_warmup_steps at 0")
    if "metrics" in inspect.signature(schedule_class.step).parameters:
        raise UserError(f"--lr_scheduler_type {path} needs a metric at each step", "use a schedule that counts steps")
    arguments = key_values(config.lr_scheduler_args, "--lr_scheduler_args")
    try:
        return schedule_class(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"--lr_scheduler_type {path}: {error}", "check --lr_scheduler_args") from error
