"""The epoch plan: which pictures make which batch, in which order, on which process.

Computed from item list and seed alone, without reading a picture, so that it can be printed, tested and
resumed at any position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from library.data.buckets import Buckets
from library.messages import UserError
from library.runtime.streams import python_stream

Entry = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """One micro-batch of one process.

    Attributes:
        dataset: index of the data set in its group.
        bucket: (width, height) of every picture in it.
        items: indices into the data set's item list (an item stands `repeats` times in an epoch's plan).
        occurrences: per item, which of its repeats in this epoch this is, from 0. Item and occurrence name the
            random draws, so they depend neither on batch size nor on the number of processes.
    """

    dataset: int
    bucket: tuple[int, int]
    items: tuple[int, ...]
    occurrences: tuple[int, ...]


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


class Plannable(Protocol):
    """What a plan needs to know of a data set: its buckets, and how many of their entries make a batch."""

    @property
    def plan_batch_size(self) -> int: ...
    @property
    def buckets(self) -> Buckets: ...


def make_plan(datasets: Sequence[Plannable], *, seed: int, epoch: int, processes: int = 1) -> EpochPlan:
    """Plan one epoch.

    Each bucket's entries are shuffled and cut into rounds of `batch_size * processes`; a round is one position of
    the plan, split evenly over the processes. So two processes with batch size b see the rounds of one process
    with batch size 2b. A bucket's last round may be smaller; if it has fewer entries than there are processes, it
    is filled up with the first entries of the same bucket, which then come twice in this epoch. With one process
    each entry comes exactly once. All rounds of all data sets are then shuffled together.

    Args:
        datasets: the members of a group.
        seed: the run's seed.
        epoch: 1-based.
        processes: number of processes that train together.
    """
    rounds: list[tuple[int, tuple[int, int], list[Entry]]] = []
    for index, dataset in enumerate(datasets):
        _check_batch_size(dataset.plan_batch_size)
        for size, members in zip(dataset.buckets.sizes, dataset.buckets.members, strict=True):
            entries = _numbered(members)
            python_stream(seed, "plan", epoch, f"{index}/{size[0]}x{size[1]}").shuffle(entries)
            length = dataset.plan_batch_size * processes
            rounds += [(index, size, entries[at : at + length]) for at in range(0, len(entries), length)]
            if rounds:
                _fill(rounds[-1][2], entries, processes)
    python_stream(seed, "plan", epoch, "order").shuffle(rounds)
    shares = [
        tuple(_planned(index, size, entries[rank::processes]) for index, size, entries in rounds)
        for rank in range(processes)
    ]
    return EpochPlan(epoch, seed, tuple(shares))


def batches_per_epoch(datasets: Sequence[Plannable], processes: int = 1) -> int:
    """Length of every epoch's plan, without making one."""
    for dataset in datasets:
        _check_batch_size(dataset.plan_batch_size)
    return sum(dataset.buckets.batch_count(dataset.plan_batch_size * processes) for dataset in datasets)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}", "set batch_size (train_batch_size) to 1 or more")


def _numbered(members: Sequence[int]) -> list[Entry]:
    """(item, occurrence) for a list in which an item may stand several times."""
    seen: dict[int, int] = {}
    entries = []
    for item in members:
        occurrence = seen.get(item, 0)
        seen[item] = occurrence + 1
        entries.append((item, occurrence))
    return entries


def _fill(last: list[Entry], entries: Sequence[Entry], processes: int) -> None:
    """Lengthen a round so that every process has at least one entry."""
    source = list(entries)
    for index in range(processes - len(last)):
        last.append(source[index % len(source)])


def _planned(index: int, size: tuple[int, int], entries: Sequence[Entry]) -> PlannedBatch:
    items, occurrences = zip(*entries, strict=True)
    return PlannedBatch(index, size, items, occurrences)
