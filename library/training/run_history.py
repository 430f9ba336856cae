"""The lines of a run's record, sorted by kind, and what follows from them."""

from __future__ import annotations

from typing import Any

from library.charts import Point
from library.training.micro_losses import BANDS

# The chart of a smoothed line averages this share of the steps.
SMOOTHING = 0.03
SMOOTHING_RANGE = (5, 200)
# Marks that still read as lines.
MOST_MARKS = 30


class History:
    """A run so far.

    Attributes:
        runs: a line for every start; run: the last of them.
        steps, validations, samples, saves, notices: lines of these kinds, in order.
        end: how it ended, None while it goes on.
    """

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.runs = [line for line in lines if line.get("kind") == "run"]
        self.steps = [line for line in lines if line.get("kind") == "step"]
        self.validations = [line for line in lines if line.get("kind") == "validation" and line["loss"] is not None]
        self.samples = [line for line in lines if line.get("kind") == "sample"]
        self.saves = [line for line in lines if line.get("kind") == "save"]
        self.notices = [line for line in lines if line.get("kind") == "notice"]
        self.end = lines[-1] if lines and lines[-1].get("kind") == "end" else None

    @property
    def run(self) -> dict[str, Any]:
        return self.runs[-1]

    def points(self, name: str) -> list[Point]:
        """(step, value) of each step that has one."""
        return [(line["step"], line[name]) for line in self.steps if line.get(name) is not None]

    def bands(self) -> list[list[Point]]:
        """Smoothed loss of each band of timesteps."""
        window = smoothing_window(len(self.steps)) * 2
        return [self._band(number, window) for number in range(BANDS)]

    def _band(self, number: int, window: int) -> list[Point]:
        """Mean over the samples that the last `window` steps drew from one band."""
        entries = [(line["step"], *line["bands"][number]) for line in self.steps if line["bands"]]
        points: list[Point] = []
        total = count = 0.0
        for at, (step, loss, samples) in enumerate(entries):
            total += loss or 0.0
            count += samples
            if at >= window:
                total -= entries[at - window][1] or 0.0
                count -= entries[at - window][2]
            if count > 0 and samples:
                points.append((step, total / count))
        return points

    @property
    def seconds(self) -> float:
        """That all updates took."""
        return sum(line["seconds"] for line in self.steps)

    @property
    def waiting_share(self) -> float:
        """Of that time, the share in which the loop waited for data."""
        return sum(line["waited"] for line in self.steps) / self.seconds if self.seconds else 0.0

    @property
    def pictures_per_second(self) -> float:
        """Over the whole run."""
        return len(self.steps) * self.run["pictures_per_update"] / self.seconds if self.seconds else 0.0

    @property
    def peak_share(self) -> float | None:
        """Share of the device's arithmetic that was used, None where its peak is not known."""
        peak = self.run.get("peak_flops")
        work = next((line["flops"] for line in reversed(self.steps) if line.get("flops")), None)
        if not peak or not work:
            return None
        return self.pictures_per_second * work / (peak * self.run["processes"])

    @property
    def memory(self) -> int | None:
        """Most bytes in use at once."""
        return max((line["memory"] for line in self.steps if line["memory"]), default=None)

    def epoch_marks(self) -> list[tuple[float, str]]:
        """The ends of epochs, where they are few."""
        ends = [a for a, b in zip(self.steps, self.steps[1:], strict=False) if b["epoch"] != a["epoch"]]
        return [(line["step"], f"epoch {line['epoch']}") for line in ends] if len(ends) <= MOST_MARKS else []


def smoothing_window(steps: int) -> int:
    """Over how many steps a line of `steps` steps is averaged."""
    low, high = SMOOTHING_RANGE
    return max(1, min(high, max(low, round(steps * SMOOTHING)), steps))


def smoothed(points: list[Point]) -> list[Point]:
    """The mean of each value and those before it, over the window."""
    window = smoothing_window(len(points))
    result: list[Point] = []
    total = 0.0
    for at, (step, value) in enumerate(points):
        total += value
        if at >= window:
            total -= points[at - window][1]
        result.append((step, total / min(at + 1, window)))
    return result
