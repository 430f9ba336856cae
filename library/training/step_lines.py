"""The record's lines of updates: the micro-steps of one update make one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.runtime.memory import peak_bytes
from library.training.metrics import rate_logs

if TYPE_CHECKING:
    from library.training.logbook import Entry
    from library.training.micro_losses import Fetched
    from library.training.run import Run


class StepLines:
    """Collects micro-steps until their update is complete."""

    def __init__(self) -> None:
        self._parts: list[Fetched] = []
        self._lines: list[dict[str, Any]] = []

    def add(self, run: Run, entry: Entry, fetched: Fetched, average: float) -> None:
        """Note one micro-step.

        Args:
            average: of the loss recorder after it.
        """
        self._parts.append(fetched)
        if not entry.updated:
            return
        parts, self._parts = self._parts, []
        bands = [[sum(part.bands[band][i] for part in parts) for i in (0, 1)] for band in range(len(fetched.bands))]
        rates = rate_logs(entry.rates, run.log.group_names, run.optimizer)
        self._lines.append(
            {
                "kind": "step",
                "step": entry.step,
                "epoch": entry.epoch,
                "loss": sum(part.loss for part in parts) / len(parts),
                "average": average,
                "rates": {name.removeprefix("lr/"): float(rate) for name, rate in rates.items()},
                "norm": fetched.norm,
                "bands": bands,
            }
        )

    def take(self, run: Run, seconds: float, waited: float) -> list[dict[str, Any]]:
        """The lines that are complete.

        Args:
            seconds, waited: that all of them took together, and waited for data.
        """
        lines, self._lines = self._lines, []
        count = max(1, len(lines))
        shared: dict[str, Any] = {
            "seconds": seconds / count,
            "waited": waited / count,
            "memory": peak_bytes(run.processes.device),
        }
        shared["flops"] = run.log.work.per_picture
        return [{**line, **shared} for line in lines]
