"""What a run shows before its first step: the data, what trains, how long, and options without effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.data import report as data_report
from library.messages import log
from library.options.describe import describe

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.training.run import Run


def show_settings(options: Resolved, run: Run) -> None:
    """The effective settings block (design: resolved once, shown once)."""
    lines = data_report.describe(run.feed.group.datasets)
    lines += ["", "training"] + [f"  {line}" for line in parts(run)] + [f"  {line}" for line in length(run)]
    lines += ["", *describe(options)]
    for line in lines:
        log.info("%s", line)


def parts(run: Run) -> list[str]:
    """Each optimizer group with its parameters and rate."""
    lines = []
    for name, group in zip(run.log.group_names, run.optimizer.param_groups, strict=True):
        count = sum(parameter.numel() for parameter in group["params"])
        rate = group.get("initial_lr", group["lr"])
        shown = "its own rate" if rate is None else f"rate {rate:g}"
        lines.append(f"{name}: {count:,} parameters in {len(group['params'])} tensors, {shown}")
    return lines


def length(run: Run) -> list[str]:
    """Steps, epochs and pictures a step, as an equation with its numbers."""
    feed = run.feed
    return [
        f"{run.max_steps} steps in {run.epochs} epochs; an epoch: {feed.batches_per_epoch} batches"
        f" / {feed.accumulation} accumulated = {feed.updates_per_epoch} steps on {feed.processes.count} process(es)",
        f"{run.log.pictures_per_update} pictures a step, seed {run.seed}, {run.processes.device}",
    ]
