"""The loader: fetches what an epoch's plan says, in worker processes if wanted, always with the same result."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import torch
from torch.utils.data import DataLoader

from library.data.listing import picture_suffixes
from library.data.plan import EpochPlan, PlannedBatch
from library.messages import UserError
from library.runtime.streams import stream_seed

if TYPE_CHECKING:
    from library.data.batch import Batch


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked for: a planned batch, and when it is used."""

    planned: PlannedBatch
    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A `UserError` on its way out of a worker; torch would turn it into a traceback of many lines."""

    problem: str
    remedy: str


class _Batches(torch.utils.data.Dataset):
    """A group as a torch data set whose index is a request."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __getitem__(self, request: Request) -> Batch | Failure:
        try:
            return self.group.batch(request.planned, epoch=request.epoch, step=request.step)
        except UserError as error:
            return Failure(error.problem, error.remedy)


class _Requests:
    """The requests of one epoch, in order; the sampler of the loader."""

    def __init__(self) -> None:
        self.pending: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pending)

    def __len__(self) -> int:
        return len(self.pending)


@dataclass(slots=True)
class _Kept:
    """A loader whose workers stay alive between epochs, and what it was made for."""

    workers: int
    pin_memory: bool
    requests: _Requests
    loader: DataLoader


_kept: list[_Kept] = []


def close_loaders() -> None:
    """End the workers that `persistent` kept alive."""
    _kept.clear()


def make_loader(
    group: Any,
    plan: EpochPlan,
    *,
    rank: int = 0,
    start: int = 0,
    workers: int = 0,
    persistent: bool = False,
    pin_memory: bool = False,
    first_step: int = 0,
    accumulation: int = 1,
) -> Iterator[Batch]:
    """The batches of one process in an epoch.

    What comes out depends on the plan alone: not on the number of workers, and a start in the middle gives the rest
    of what a start at 0 gives.

    Args:
        group: `DatasetGroup`, or another object with its `batch` method.
        plan: of the epoch.
        rank: which process.
        start: position in the plan to begin at.
        workers: worker processes that prepare batches ahead; 0: each batch is made when it is asked for.
        persistent: keep the workers for the next epoch. They see the group as it was when they were started.
        pin_memory: put batches into page-locked memory for the copy to a GPU.
        first_step: global step (optimizer updates) at `start`, for token warm-up.
        accumulation: micro-steps per update.

    Raises:
        UserError: while iterating: a picture or cache file cannot be used, or a worker was killed.
    """
    passed = start // accumulation
    wanted = [
        Request(planned, plan.epoch, first_step + position // accumulation - passed)
        for position, planned in enumerate(plan.batches[rank][start:], start)
    ]
    seed = stream_seed(plan.seed, "workers", plan.epoch)
    loader, requests = _loader(group, workers, persistent and workers > 0, pin_memory, seed)
    requests.pending = wanted
    return _fetch(loader)


def _loader(group: Any, workers: int, persistent: bool, pin_memory: bool, seed: int) -> tuple[DataLoader, _Requests]:
    for kept in _kept if persistent else []:
        if kept.loader.dataset.group is group and (kept.workers, kept.pin_memory) == (workers, pin_memory):
            return kept.loader, kept.requests
    requests = _Requests()
    loader = DataLoader(
        _Batches(group),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        persistent_workers=persistent,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if workers else None,
        # Its own generator: the loader would draw from torch's global one. Foreign data sets draw from its seeds.
        generator=torch.Generator().manual_seed(seed),
    )
    if persistent:
        _kept.append(_Kept(workers, pin_memory, requests, loader))
    return loader, requests


def _start_worker(_: int) -> None:
    # The main process finishes its step on Ctrl-C and ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    picture_suffixes()  # a spawned worker has not loaded Pillow's plug-ins yet


def _fetch(loader: DataLoader) -> Iterator[Batch]:
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
                raise
            raise UserError(
                "a data loader worker was killed, most likely because memory ran out",
                "lower --max_data_loader_n_workers",
            ) from error
        if isinstance(batch, Failure):
            raise UserError(batch.problem, batch.remedy)
        yield batch
