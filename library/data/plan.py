"""The epoch plan: which pictures make which batch, in which order, on which process.

Computed from item list and seed alone, without reading a picture, so that it can be printed, tested and
resumed at any position.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """One micro-batch of one process.

    Attributes:
        dataset: index of the data set in its group.
        bucket: (width, height) of every picture in it.
        items: indices into the data set's item list (an item stands `repeats` times in an epoch's plan).
    """

    dataset: int
    bucket: tuple[int, int]
    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """An epoch: `batches[rank][position]`; every rank has the same count and, per position, the same bucket.

    Attributes:
        epoch: 1-based.
        seed: the run's seed.
        batches: one list per process.
    """

    epoch: int
    seed: int
    batches: tuple[tuple[PlannedBatch, ...], ...]

    def __len__(self) -> int:
        """Micro-steps of this epoch on each process."""
        return len(self.batches[0])
