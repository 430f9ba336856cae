"""Collects what steps log and writes it in bulk, so that a step itself reads nothing from the device.

Losses and norms stay tensors until the book is flushed: every `FLUSH_EVERY` updates, at the end of an epoch, and
before anything is saved. Each value is then logged under its own step: to the trackers, and to the run's own record
(`record.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from library.messages import Progress, log
from library.training.metrics import LossRecorder, step_logs
from library.training.micro_losses import fetch
from library.training.step_lines import StepLines
from library.training.stopwatch import Stopwatch
from library.training.work import WorkCounter

if TYPE_CHECKING:
    from library.training.hooks import Hooks
    from library.training.record import Record
    from library.training.run import Run

FLUSH_EVERY = 10


@dataclass(slots=True)
class Entry:
    """One micro-step; `values` may hold device tensors.

    Attributes:
        samples: loss and timestep of each of its samples, both (B,), where they are known.
        updated: it made an update.
        norm: of that update's gradients, None where it was not measured.
    """

    epoch: int
    micro: int
    step: int
    loss: torch.Tensor
    rates: list[Any]
    values: dict[str, Any] = field(default_factory=dict)
    samples: tuple[torch.Tensor, torch.Tensor] | None = None
    updated: bool = True
    norm: torch.Tensor | None = None


class LogBook:
    """Loss average, trackers and the progress bar of a run.

    Args:
        total: updates of the whole run.
        pictures_per_update: over all processes, for the speed shown.
        group_names: one per optimizer group.
        log_to: `log(values, step=...)` of the active trackers, or None.
        hooks, args: a trainer's hooks and its live namespace, where there is one.
        step_logs: makes the trackers' values of a micro-step, see `metrics.py`.
        record: the run's own record, or None (also in every process but the first).
        work: counts what a picture costs.
    """

    def __init__(
        self,
        *,
        total: int,
        pictures_per_update: int,
        group_names: list[str],
        log_to: Any = None,
        hooks: Hooks | None = None,
        args: Any = None,
        step_logs: Callable[..., dict[str, Any]] = step_logs,
        record: Record | None = None,
        work: WorkCounter | None = None,
    ) -> None:
        self.recorder = LossRecorder()
        self.group_names = group_names
        self.log_to = log_to
        self.hooks = hooks
        self.args = args
        self.step_logs = step_logs
        self.entries: list[Entry] = []
        self.total = total
        self.pictures_per_update = pictures_per_update
        self.bar: Progress | None = None
        self.record = record
        self.lines = StepLines()
        self.work = work or WorkCounter()
        self.stopwatch = Stopwatch()
        self._samples: tuple[torch.Tensor, torch.Tensor] | None = None

    def note_samples(self, losses: torch.Tensor, timesteps: torch.Tensor) -> None:
        """Losses and timesteps (B,) of the samples of the micro-step that is under way."""
        # a hook may have made one number of them, of which nobody knows the timestep
        self._samples = (losses.detach(), timesteps) if losses.shape == timesteps.shape else None

    def forget_samples(self) -> None:
        """What was noted last belongs to no micro-step."""
        self._samples = None

    def note(
        self,
        run: Run,
        loss: torch.Tensor,
        values: dict[str, Any],
        *,
        updated: bool = True,
        norm: torch.Tensor | None = None,
    ) -> None:
        """Note one micro-step, after its update if it made one, whose gradients had the `norm`."""
        position = run.position
        rates = getattr(run.lr_schedule, "unread_rates", run.lr_schedule.get_last_lr)()
        samples, self._samples = self._samples, None
        self.entries.append(
            Entry(position.epoch, position.micro - 1, position.step, loss, rates, values, samples, updated, norm)
        )

    def flush_if_due(self, run: Run) -> None:
        """Write now if enough was noted, or if a hook wants to see every micro-step."""
        if self._calls_hook() or len(self.entries) >= FLUSH_EVERY * run.accumulation:
            self.flush(run)

    def forget_after(self, step: int) -> None:
        """Drop what was noted in updates after `step`: they were not made."""
        self.entries = [entry for entry in self.entries if entry.step <= step]

    def flush(self, run: Run) -> None:
        """Fetch everything noted so far in one read and log it."""
        entries, self.entries = self.entries, []
        if not entries:
            return
        fetched = fetch(entries, run.processes)
        for entry, got in zip(entries, fetched, strict=True):
            entry.rates = [float(rate) for rate in entry.rates]
            self.recorder.add(epoch=entry.epoch - 1, step=entry.micro, loss=got.loss)
            if run.processes.is_main:
                self._log(run, entry, got.loss)
                if self.record is not None:
                    self.lines.add(run, entry, got, self.recorder.moving_average)
        if self.record is not None:
            self.record.add(*self.lines.take(run, *self.stopwatch.read()))
        self._show(run)

    @contextlib.contextmanager
    def aside(self, run: Run) -> Iterator[None]:
        """What is done inside the block is not part of the updates' time. Every process enters."""
        self.flush(run)
        try:
            yield
        finally:
            self.stopwatch.restart()

    def log_apart(self, run: Run, values: dict[str, float]) -> None:
        """Log values that belong to no micro-step (validation) under the current step."""
        if run.processes.is_main and self.log_to is not None:
            self.log_to(values, step=run.position.step)

    def event(self, run: Run, kind: str, **facts: Any) -> None:
        """A line of the run's record about what just happened."""
        if self.record is not None:
            self.record.add({"kind": kind, "step": run.position.step, "epoch": run.position.epoch, **facts})

    def recorded(self) -> contextlib.AbstractContextManager:
        """The record is completed when the block ends, however it ends."""
        return contextlib.nullcontext() if self.record is None else self.record.open_until_the_end()

    def _calls_hook(self) -> bool:
        return self.hooks is not None and (
            self.hooks.overridden("generate_step_logs") or self.hooks.overridden("step_logging")
        )

    def _log(self, run: Run, entry: Entry, loss: float) -> None:
        # read live: hooks may switch logging on while the run goes
        if self.log_to is None and not getattr(self.args, "logging_dir", None):
            return
        values = {k: v.item() if torch.is_tensor(v) else v for k, v in entry.values.items()}
        average = self.recorder.moving_average
        if self._calls_hook():
            assert self.hooks is not None
            logs = self.hooks.step_logs(
                args=self.args,
                current_loss=loss,
                avr_loss=average,
                lr_scheduler=run.lr_schedule,
                lr_descriptions=self.group_names,
                optimizer=run.optimizer,
                mean_grad_norm=None,
                mean_combined_norm=None,
                **{key: values.get(key) for key in ("keys_scaled", "mean_norm", "maximum_norm")},
            )
            self.hooks.call("step_logging", run.processes.accelerator, logs, entry.step, entry.epoch)
            return
        logs = self.step_logs(loss, average, entry.rates, self.group_names, optimizer=run.optimizer, **values)
        (self.log_to or run.processes.accelerator.log)(logs, step=entry.step)

    def open(self, run: Run) -> None:
        """Show the progress from here on."""
        self.bar = Progress(self.total, "steps", initial=run.position.step)
        self.bar.__enter__()
        self.stopwatch.restart()

    def _show(self, run: Run) -> None:
        if self.bar is None or run.position.step <= self.bar.done:
            return
        self.bar.done = run.position.step  # counted before the rate is asked for
        shown = {"loss": self.recorder.moving_average, "pictures/s": self.bar.rate * self.pictures_per_update}
        self.bar.update(0, **shown)

    def end_of_epoch(self, run: Run) -> None:
        """Flush, and log the epoch's mean loss under its number."""
        self.flush(run)
        epoch, loss = run.position.epoch, self.recorder.moving_average
        if run.processes.is_main and self.log_to is not None:
            self.log_to({"loss/epoch": loss, "epoch": epoch}, step=epoch)
        log.debug("epoch %d: loss %.4g", epoch, loss)

    def close(self, run: Run) -> None:
        self.flush(run)
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same averages."""
        return self.recorder.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.recorder.load_state(state)
