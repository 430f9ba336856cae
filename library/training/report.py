"""What a run shows before its first step: the data, what trains, how long, and options without effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.data import report as data_report
from library.messages import log
from library.options.describe import describe
from library.runtime.devices import memory_stats
from library.training.disk_need import disk_need, require_room
from library.training.memory_need import gib, memory_need

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.training.run import Run


# Rates that a target may take itself as "this part is not trained" -> the part.
RATES = {
    "unet_lr": "U-Net",
    "text_encoder_lr": "text encoder",
    "learning_rate_te": "text encoder",
    "learning_rate_te1": "first text encoder",
    "learning_rate_te2": "second text encoder",
}


def show_settings(options: Resolved, run: Run, idle: Sequence[str] = ()) -> None:
    """The effective settings block (design: resolved once, shown once).

    Args:
        idle: names of parts that were set aside because their rate is 0.
    """
    lines = data_report.describe(run.feed.group.datasets)
    lines += ["", "training"]
    lines += [f"  {line}" for line in (*parts(run), *frozen_parts(options, idle), *length(run))]
    disk = disk_need(run, options)
    memory = device_memory(run, options)
    lines += [f"  {line}" for line in (*memory, disk.describe())]
    lines += ["", *describe(options)]
    for line in lines:
        log.info("%s", line)
    if run.processes.is_main:
        require_room(disk, options.saving.output_dir or ".")


def device_memory(run: Run, options: Resolved) -> list[str]:
    """The expected peak on a GPU; on a CPU it is worked out for `--dry_run` only, since it takes a second or more."""
    device = run.processes.device
    if device.type == "cpu" and not options.loop.dry_run:
        return []
    need = memory_need(run, options)
    if need is None:
        return []
    there = memory_stats(device).total
    if there is not None and need.total > there:
        log.warning(
            "memory: about %s are needed and the device has %s; switch on, the most helpful first: %s",
            gib(need.total),
            gib(there),
            "; ".join(run.memory_remedies),
        )
    return [need.describe(there)]


def parts(run: Run) -> list[str]:
    """Each optimizer group with its parameters and rate."""
    lines = []
    for name, group in zip(run.log.group_names, run.optimizer.param_groups, strict=True):
        count = sum(parameter.numel() for parameter in group["params"])
        rate = group.get("initial_lr", group["lr"])
        shown = "its own rate" if rate is None else f"rate {rate:g}"
        lines.append(f"{name}: {count:,} parameters in {len(group['params'])} tensors, {shown}")
    return lines


def frozen_parts(options: Resolved, idle: Sequence[str]) -> list[str]:
    """What a rate of 0 freezes."""
    names = list(idle) or [part for option, part in RATES.items() if _is_zero(options.value(option))]
    return [f"{name}: rate 0, frozen" for name in names]


def _is_zero(rate: object) -> bool:
    return 0 in rate if isinstance(rate, (list, tuple)) else rate == 0


def length(run: Run) -> list[str]:
    """Steps, epochs and pictures a step, as an equation with its numbers."""
    feed, processes = run.feed, run.feed.processes.count
    epochs = "1 epoch" if run.epochs == 1 else f"{run.epochs} epochs"
    launched = "one process" if processes == 1 else f"{processes} processes"
    return [
        f"{run.max_steps} steps in {epochs}; an epoch: {feed.batches_per_epoch} batches"
        f" / {feed.accumulation} accumulated = {feed.updates_per_epoch} steps on {launched}",
        f"{run.log.pictures_per_update} pictures a step, seed {run.seed}, {run.processes.device}",
    ]
