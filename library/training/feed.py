"""Epoch plans and their batches, as the loop asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from library.data.loader import make_loader
from library.training.draws import Place

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.data.plan import EpochPlan
    from library.runtime.processes import Processes


class DataFeed:
    """The data set group of a run and how it is dealt out.

    Args:
        group: the data set group.
        seed: of order, captions and augmentation.
        processes: rank and count.
        accumulation: micro-steps per update.
        workers, persistent: of the loader.
        pin_memory: batches go into pinned memory (CUDA).
    """

    def __init__(
        self,
        group: Any,
        *,
        seed: int,
        processes: Processes,
        accumulation: int,
        workers: int,
        persistent: bool,
        pin_memory: bool,
    ) -> None:
        self.group = group
        self.seed = seed
        self.processes = processes
        self.accumulation = accumulation
        self.workers = workers
        self.persistent = persistent
        self.pin_memory = pin_memory
        self.plan = lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> EpochPlan:
        return self.group.plan(self.seed, epoch, self.processes.count)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-steps of an epoch on each process."""
        return len(self.plan(1))

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates of an epoch; the last may have fewer micro-steps."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    def batches(self, plan: EpochPlan, start: int, step: int) -> Iterator[Batch]:
        """The plan's batches of this process from position `start`; `step` is the global step there."""
        return make_loader(
            self.group,
            plan,
            rank=self.processes.rank,
            start=start,
            workers=self.workers,
            persistent=self.persistent,
            pin_memory=self.pin_memory,
            first_step=step,
            accumulation=self.accumulation,
        )

    def place(self, epoch: int, micro: int) -> Place:
        rank, count = self.processes.rank, self.processes.count
        samples = [len(batches[micro].items) for batches in self.plan(epoch).batches]
        return Place(epoch, micro, micro * count + rank, rank, count, samples[rank], sum(samples))

    def loss_weights(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """float32 (B) or a number, as foreign data sets may give."""
        weights = batch.get("loss_weights", 1.0)
        return (
            weights.to(device, non_blocking=True) if isinstance(weights, torch.Tensor) else torch.tensor(float(weights))
        )

    def loss_mask(self, batch: Batch, device: torch.device) -> torch.Tensor | None:
        """(B, 1, H, W) in [0, 1] from the pictures' alpha channels, or None when the batch has none."""
        alpha = batch.get("alpha_masks")
        return None if alpha is None else alpha.unsqueeze(1).to(device, non_blocking=True)
