"""Optimizers by name: the class, its arguments, and what a choice changes in the rest of the options."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from library.messages import UserError, log
from library.options.registries import OPTIMIZERS, OptimizerRecord, find_optimizer, nearest
from library.options.values import key_values
from library.training.fused_backward import FusedBackward
from library.training.pieces import Group, PiecewiseOptimizer, equal_runs, instances, runs_of

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerConfig
    from library.training.stochastic_rounding import StochasticRounding

NOTICES = {
    "momentum_set": "{name}: momentum is 0.9; set another with --optimizer_args momentum=...",
    "lr_too_low": "{name} finds its rate itself; a learning rate of {lr} is very low for it, 1.0 is usual",
    "several_lrs": "{name} finds a step size for each part by itself, times its rate ({lrs})",
    "relative_step_forced_by_warmup_init": "Adafactor: warmup_init needs relative_step, which is switched on",
    "relative_step_on": "Adafactor sets its learning rate itself (relative_step)",
    "lr_becomes_initial_lr": "Adafactor: the learning rate {lr} is shown for the first step only",
    "group_lrs_ignored": "Adafactor: --unet_lr and --text_encoder_lr have no effect with relative_step",
    "scheduler_forced": "Adafactor: --lr_scheduler {lr_scheduler} has no effect with relative_step",
    "clipping_discouraged": "Adafactor clips updates itself; --max_grad_norm 0 is recommended",
    "constant_with_warmup_advised": "Adafactor without relative_step: --lr_scheduler constant_with_warmup is usual",
    "clip_threshold_advised": "Adafactor without relative_step: clip_threshold=1.0 is recommended",
}
# Where torch has one kernel for the whole update; elsewhere it loops over the parameters in Python.
FUSED_DEVICES = ("cuda", "xpu", "cpu")
FUSED_CLASSES = ("AdamW", "Adam", "SGD")
_FORMS = ("fused", "foreach", "capturable")
# Float32 copies of bfloat16 weights exist for so many weights at a time (256 MiB, and as much for the gradients).
ROUNDED_AT_ONCE = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A made optimizer and what its choice means for the run.

    Attributes:
        name: module and class, as `ss_optimizer` stores it.
        args_text: its arguments as `key=value,...`, as `ss_optimizer` stores them.
        optimizer: the optimizer; schedule-free ones are in training mode.
        effective_config: the options with what the optimizer changed (Adafactor's rate and schedule).
        ignores_group_rates: rates of the groups were dropped; `unet_lr` and `text_encoder_lr` count as not given.
        notices: keys of `NOTICES` that were said.
        sources: for each group of the optimizer the number of the group that it was made of.
        clips: the optimizer limits gradients itself, so `max_grad_norm` is done.
    """

    name: str
    args_text: str
    optimizer: torch.optim.Optimizer
    effective_config: OptimizerConfig
    ignores_group_rates: bool = False
    notices: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()
    clips: bool = False


@dataclass(slots=True)
class _Plan:
    """What is decided before the class is called."""

    name: str
    groups: list[dict[str, Any]]
    arguments: dict[str, Any]
    hidden: dict[str, Any]
    config: OptimizerConfig
    ignores_group_rates: bool
    notices: list[str]

    def say(self, notice: str, **values: Any) -> None:
        self.notices.append(notice)
        log.info(NOTICES[notice].format(name=self.name, **values))


def optimizer_name(config: OptimizerConfig) -> str:
    """The chosen `--optimizer_type`, the old flags included; "" is AdamW.

    Raises:
        UserError: two of the options name an optimizer.
    """
    chosen = {
        "--use_8bit_adam": "AdamW8bit" if config.use_8bit_adam else "",
        "--use_lion_optimizer": "Lion" if config.use_lion_optimizer else "",
        f"--optimizer_type {config.optimizer_type}": config.optimizer_type or "",
    }
    given = [flag for flag, name in chosen.items() if name]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} name two optimizers", "give only --optimizer_type")
    return chosen[given[0]] if given else "AdamW"


def is_schedule_free(config: OptimizerConfig) -> bool:
    """Whether the optimizer takes no schedule and must be told about training and evaluation."""
    return optimizer_name(config).lower().endswith("schedulefree")


def make_optimizer(
    groups: Iterable[Any],
    config: OptimizerConfig,
    *,
    fused_groups: int | None = None,
    rounding: StochasticRounding | None = None,
) -> Built:
    """Make the optimizer that the options name.

    Args:
        groups: parameter groups (`params`, and `lr` where a group has its own rate) or plain parameters.
        config: optimizer and learning rate.
        fused_groups: `--fused_optimizer_groups`.
        rounding: how bfloat16 weights are updated; None updates them as they are.

    Raises:
        UserError: unknown optimizer, missing or old package, or an argument it does not take.
    """
    name = optimizer_name(config)
    record = find_optimizer(name)
    optimizer_class = _load(name, record)
    record = record or _same_class(name)
    plan = _Plan(
        name=name,
        groups=_as_groups(groups),
        arguments=key_values(config.optimizer_args, "--optimizer_args"),
        hidden={},
        config=config,
        ignores_group_rates=False,
        notices=[],
    )
    _apply_defaults(plan, record)
    if record is not None and record.adaptive:
        _check_adaptive(plan)
    if record is not None and record.name == "AdaFactor":
        _plan_adafactor(plan)
    sources = list(range(len(plan.groups)))
    if fused_groups:
        sources, plan.groups = equal_runs(plan.groups, fused_groups)
    optimizer = _arrange(optimizer_class, plan, record, bool(fused_groups), rounding)
    set_training(optimizer, True)
    return Built(
        name=f"{optimizer_class.__module__}.{optimizer_class.__name__}",
        args_text=",".join(f"{key}={value}" for key, value in plan.arguments.items()),
        optimizer=optimizer,
        effective_config=plan.config,
        ignores_group_rates=plan.ignores_group_rates,
        notices=tuple(plan.notices),
        sources=tuple(sources),
        clips=isinstance(optimizer, FusedBackward),
    )


def require_optimizer(config: OptimizerConfig) -> None:
    """Refuse an optimizer that cannot be made, before minutes are spent on caches.

    Raises:
        UserError: unknown optimizer, missing or old package.
    """
    name = optimizer_name(config)
    _load(name, find_optimizer(name))


def set_training(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Switch a schedule-free optimizer's weights between training and evaluation; nothing for the others.

    The weights of evaluation replace those of training for a while; going back restores these exactly, so that
    saving and sampling change nothing in the run.
    """
    for instance in instances(optimizer):
        if callable(getattr(instance, "train", None)) and callable(getattr(instance, "eval", None)):
            _to_training(instance) if training else _to_evaluation(instance)


def _to_evaluation(optimizer: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not hasattr(optimizer, "training_weights"):
        optimizer.training_weights = [parameter.detach().clone() for parameter in parameters]
    halves = [p for p in parameters if p.dtype != torch.float32]
    stored = [parameter.data for parameter in halves]
    for parameter in halves:
        parameter.data = parameter.data.float()  # the averages are float32
    optimizer.eval()
    for parameter, half in zip(halves, stored, strict=True):
        half.copy_(parameter.data)
        parameter.data = half


def _to_training(optimizer: Any) -> None:
    kept = optimizer.__dict__.pop("training_weights", None)
    if kept is None:
        optimizer.train()
        return
    for group in optimizer.param_groups:
        group["train_mode"] = True
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        torch._foreach_copy_(parameters, kept)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore a stored state, also one of another machine or program: how updates are computed stays as it is here.

    Raises:
        ValueError: the state is of other parameter groups.
    """
    saved = state["param_groups"]
    if len(saved) == len(optimizer.param_groups):
        kept = [{k: group[k] for k in _FORMS if k in group} for group in optimizer.param_groups]
        saved = [{**group, **form} for group, form in zip(saved, kept, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": saved})


def parameter_rates(groups: Iterable[dict[str, Any]], default: float | None) -> list[float | None]:
    """The rate of each group; a group without one has the default."""
    return [group.get("lr", default) for group in groups]


def _as_groups(groups: Iterable[Any]) -> list[dict[str, Any]]:
    groups = list(groups)
    if not groups or not isinstance(groups[0], dict):
        return [{"params": groups}]
    return [{**group, "params": list(group["params"])} for group in groups]


def _load(name: str, record: OptimizerRecord | None) -> type[torch.optim.Optimizer]:
    if record is not None:
        return _load_path(record.path, record.package, record.min_version)
    known = [r.name for r in OPTIMIZERS]
    if "." not in name:
        if not name.lower().startswith("dadapt") and isinstance(getattr(torch.optim, name, None), type):
            return getattr(torch.optim, name)
        known += [n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)]
        near = nearest(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
        raise UserError(f"unknown optimizer {name!r}", hint)
    return _load_path(name, None, None)


def _load_path(path: str, package: str | None, min_version: str | None) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        wanted = package or module_name.split(".")[0]
        missing = getattr(error, "name", None) or module_name
        raise UserError(f"optimizer {path}: {missing} cannot be imported ({error})", f"pip install {wanted}") from error
    if not hasattr(module, class_name):
        if min_version:
            raise UserError(f"{package} has no {class_name}", f"it needs {package} {min_version} or newer")
        near = nearest(class_name, dir(module))
        hint = f"did you mean {module_name}.{near[0]}?" if near else "check the class name"
        raise UserError(f"{module_name} has no {class_name}", hint)
    return getattr(module, class_name)


def _same_class(path: str) -> OptimizerRecord | None:
    """The facts about a class that is given by its path; only names, not paths, set arguments."""
    return next((r for r in OPTIMIZERS if r.path == path and not r.defaults and r.name != "AdaFactor"), None)


def _apply_defaults(plan: _Plan, record: OptimizerRecord | None) -> None:
    """Arguments a record sets itself; `nesterov` is part of the name, so it is not listed among the arguments."""
    for key, value in (record.defaults if record is not None else {}).items():
        if key == "nesterov":
            if plan.arguments.pop(key, True) is not True:
                raise UserError(f"{plan.name} with nesterov=False", "use SGD without it")
            plan.hidden[key] = value
        elif key not in plan.arguments:
            plan.arguments[key] = value
            if key == "momentum":
                plan.say("momentum_set")


def _check_adaptive(plan: _Plan) -> None:
    rates = parameter_rates(plan.groups, plan.groups[0].get("lr", plan.config.learning_rate))
    if rates[0] is not None and rates[0] <= 0.1:
        plan.say("lr_too_low", lr=rates[0])
    distinct = list(dict.fromkeys(rates))
    if len(distinct) > 1:
        plan.say("several_lrs", lrs=", ".join(map(str, distinct)))


def _plan_adafactor(plan: _Plan) -> None:
    """Adafactor's own rate: with `relative_step` the options' rates and schedule have no effect."""
    arguments, config = plan.arguments, plan.config
    arguments.setdefault("relative_step", True)
    if not arguments["relative_step"] and arguments.get("warmup_init"):
        plan.say("relative_step_forced_by_warmup_init")
        arguments["relative_step"] = True
    if not arguments["relative_step"]:
        if config.max_grad_norm:
            plan.say("clipping_discouraged")
        if config.lr_scheduler != "constant_with_warmup":
            plan.say("constant_with_warmup_advised")
        if arguments.get("clip_threshold", 1.0) != 1.0:
            plan.say("clip_threshold_advised")
        return
    plan.say("relative_step_on")
    if config.learning_rate:
        plan.say("lr_becomes_initial_lr", lr=config.learning_rate)
    rates = [group.pop("lr", None) for group in plan.groups]
    if any(rate is not None for rate in rates):
        plan.ignores_group_rates = True
        plan.say("group_lrs_ignored")
    if not config.lr_scheduler.startswith("adafactor"):
        plan.say("scheduler_forced", lr_scheduler=config.lr_scheduler)
    plan.config = replace(config, learning_rate=None, lr_scheduler=f"adafactor:{config.learning_rate}")


def _arrange(
    optimizer_class: type[torch.optim.Optimizer],
    plan: _Plan,
    record: OptimizerRecord | None,
    in_runs: bool,
    rounding: StochasticRounding | None,
) -> torch.optim.Optimizer:
    """One plain optimizer, or several that look like one."""
    config, groups = plan.config, plan.groups
    make = partial(_construct, optimizer_class, plan)
    independent = record is not None and record.independent
    whole = [[group["params"]] for group in groups]
    if config.fused_backward_pass:
        _require_single_updates(plan.name, record)
        single = [[[parameter] for parameter in group["params"]] for group in groups]
        return FusedBackward(make, groups, single, max_grad_norm=config.max_grad_norm, rounding=rounding)
    if in_runs:
        return FusedBackward(make, groups, whole, max_grad_norm=config.max_grad_norm, rounding=rounding)
    if record is not None and record.adaptive and "several_lrs" in plan.notices:
        return PiecewiseOptimizer(make, groups, whole, rounding=rounding)
    if rounding is None:
        return make(groups)
    runs = [list(runs_of(group["params"], ROUNDED_AT_ONCE)) for group in groups] if independent else None
    return PiecewiseOptimizer(make, groups, runs, rounding=rounding)


def _require_single_updates(name: str, record: OptimizerRecord | None) -> None:
    """Refuse optimizers whose parameters cannot be updated one by one.

    Raises:
        UserError: names those that can.
    """
    if record is None or not record.fused_backward:
        known = ", ".join(r.name for r in OPTIMIZERS if r.fused_backward)
        raise UserError(
            f"--fused_backward_pass with {name}, which is not known to update single parameters",
            f"use one of {known}, or --fused_optimizer_groups",
        )


def _construct(optimizer_class: type[torch.optim.Optimizer], plan: _Plan, groups: list[Group]) -> torch.optim.Optimizer:
    arguments = {**plan.arguments, **plan.hidden, **_fused(optimizer_class, plan)}
    try:
        return _without_host_reads(optimizer_class(groups, lr=plan.config.learning_rate, **arguments))
    except TypeError as error:
        known = inspect.signature(optimizer_class).parameters
        unknown = [key for key in arguments if key not in known]
        if not unknown or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
            raise UserError(f"{optimizer_class.__name__}: {error}", "check --optimizer_args") from error
        accepted = ", ".join(key for key in known if key not in ("params", "lr"))
        raise UserError(
            f"--optimizer_args {unknown[0]}: {optimizer_class.__name__} has no such argument", f"it takes {accepted}"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{optimizer_class.__name__}: {error}", "check --optimizer_args and the rates") from error


def _without_host_reads(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Adafactor compares a weight's size with a floor in Python, once a parameter and step; here on the device."""
    if type(optimizer).__name__ == "Adafactor" and hasattr(optimizer, "_get_lr"):
        optimizer._get_lr = _adafactor_rate  # type: ignore[attr-defined]
    return optimizer


def _adafactor_rate(group: dict[str, Any], state: dict[str, Any]) -> Any:
    """Rate of one parameter (Shazeer and Stern 2018, section 8): relative step times size of the weights."""
    rate = group["lr"]
    if group["relative_step"]:
        longest = 1e-6 * state["step"] if group["warmup_init"] else 1e-2
        rate = min(longest, state["step"] ** -0.5)
    if not group["scale_parameter"]:
        return rate
    size, floor = state["RMS"], group["eps"][1]
    return (size.clamp(min=floor) if torch.is_tensor(size) else max(size, floor)) * rate


def _fused(optimizer_class: type[torch.optim.Optimizer], plan: _Plan) -> dict[str, bool]:
    """`fused=True` where torch has the whole update as one kernel and the user chose no other form."""
    own = optimizer_class.__module__.startswith("torch.optim.") and optimizer_class.__name__ in FUSED_CLASSES
    if not own or {"fused", "foreach", "capturable", "differentiable"} & set(plan.arguments):
        return {}
    parameters = [p for group in plan.groups for p in group["params"]]
    # parts of weights (FSDP) have no such kernel for every class
    fits = all(
        p.device.type in FUSED_DEVICES and p.is_floating_point() and not hasattr(p, "full_tensor") for p in parameters
    )
    return {"fused": True} if parameters and fits else {}
