"""Caching latents: which files hold, which are made anew, and how the data sets get them.

The VAE is a callable that the caller passes in; nothing here knows a model.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from library.data.cache_tasks import (
    Task,
    batch_group,
    choose_files,
    collect_tasks,
    encoding_batches,
    require_fixed_pictures,
)
from library.data.cacher import Cacher, Encode
from library.data.dataset import Dataset
from library.data.latents_file import (
    ABSENT,
    MOVED,
    VALID,
    CachedLatents,
    fingerprint,
    judge,
    key_text,
    read_latents,
    source_state,
    write_latents,
)
from library.data.picture_check import UnreadableFiles, file_and_reason
from library.messages import UserError, log
from library.runtime.files import check_room

# A temporary file of a cache that is older than this belongs to a run that was killed.
LEFTOVER_SECONDS = 3600.0

AnyTask = TypeVar("AnyTask")


@dataclass(slots=True)
class CacheReport:
    """What caching did, on this process.

    Attributes:
        what: the cache's name in messages.
        kept: files that held.
        made: entries of pictures that had none.
        rebuilt: reason -> files made anew.
        removed: files of killed runs that were deleted.
    """

    what: str = "latent cache"
    kept: int = 0
    made: int = 0
    rebuilt: Counter[str] = field(default_factory=Counter)
    removed: int = 0

    def count(self, verdict: str) -> None:
        """Count a file by what it was before: held, absent, or the reason why it did not hold."""
        if verdict in (VALID, MOVED):
            self.kept += 1
        elif verdict == ABSENT:
            self.made += 1
        else:
            self.rebuilt[verdict] += 1

    def __str__(self) -> str:
        parts = [f"{self.kept} kept"] if self.kept else []
        if self.rebuilt:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.rebuilt.items()))
            parts.append(f"{self.rebuilt.total()} rebuilt ({reasons})")
        if self.removed:
            parts.append(f"{self.removed} leftovers of stopped runs removed")
        if self.made or not parts:
            parts.append(f"{self.made} new")
        return f"{self.what}: " + ", ".join(parts)


def cache_latents(
    datasets: Sequence[Any],
    encode: Encode,
    *,
    batch_size: int = 1,
    to_disk: bool = False,
    skip_check: bool = False,
    family: str = "sd",
    vae: str = "",
    dtype: str = "",
    encode_exact: Encode | None = None,
    rank: int = 0,
    processes: int = 1,
    wait: Callable[[], None] | None = None,
    readers: int | None = None,
) -> CacheReport:
    """Make or find the latents of every picture and hand them to the data sets.

    A stopped run goes on where it was: files that hold are kept. On disk each process makes its share of the files;
    in memory each makes all.

    Args:
        datasets: members of a group; only `Dataset`s have pictures to cache, others are left alone.
        encode: float32 pictures (B, 3, H, W) in [-1, 1] to latents (B, 4, h, w), sampled, not scaled, on any device.
        batch_size: pictures a call.
        to_disk: keep them in `.npz` files beside the pictures instead of memory.
        skip_check: an existing file is taken without a look inside.
        family: `sd` or `sdxl`.
        vae: identity of the VAE, for the files' keys; files of another one are made anew.
        dtype: the precision that the VAE computes in, likewise.
        encode_exact: asked again, in float32, where `encode` gives values that are not finite.
        rank, processes: this process and how many there are.
        wait: returns when every process has called it; needed with several processes on disk.
        readers: threads that decode pictures ahead.

    Returns:
        what was done; with several processes the first one's report counts for all, the others count their shares.

    Raises:
        UserError: latents cannot be cached with these settings, are not finite, pictures cannot be read (all others
            are cached then), or a file cannot be written.
    """
    require_fixed_pictures(datasets)
    members = [dataset for dataset in datasets if isinstance(dataset, Dataset)]
    bad: list[UserError] = []
    cacher = Cacher(
        encode, encode_exact, batch_size, readers or min(8, os.cpu_count() or 1), lambda task, error: bad.append(error)
    )
    same_stems = collect_tasks(members, family=family, vae=vae, dtype=dtype)
    if not to_disk:
        return _cache_in_memory(members, [task for tasks in same_stems for task in tasks], cacher, bad)
    return _cache_on_disk(same_stems, cacher, bad, Share(rank, processes, wait), skip_check=skip_check)


@dataclass(frozen=True, slots=True)
class Share:
    """This process' part of what there is to do.

    Attributes:
        rank, processes: this process and how many there are.
        barrier: returns when every process has called it; None: there is one process.
    """

    rank: int
    processes: int
    barrier: Callable[[], None] | None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.barrier is not None:
            self.barrier()

    def own(self, tasks: Sequence[AnyTask]) -> Sequence[AnyTask]:
        return tasks[self.rank :: self.processes]


def require_room(files: Iterable[tuple[str, int]]) -> None:
    """Refuse to start what the disk cannot hold; files that are there already make room for their successors.

    Args:
        files: path and size of each file that is to be written.

    Raises:
        UserError: names what is needed and what is free.
    """
    needed: Counter[str] = Counter()
    for path, size in files:
        there = os.path.getsize(path) if os.path.exists(path) else 0
        needed[os.path.dirname(path)] += max(0, size - there)
    disks: dict[int, tuple[str, int]] = {}
    for folder, size in needed.items():
        disk = os.stat(folder).st_dev
        disks[disk] = (folder, disks.get(disk, (folder, 0))[1] + size)
    for folder, size in disks.values():
        check_room(folder, size)


def _require_made(tasks: Iterable[Task], skip_check: bool) -> None:
    """The files that other processes had to make hold."""
    for task in tasks:
        if judge(task.path, task.wanted, skip_check=skip_check) not in (VALID, MOVED):
            raise UserError(
                f"another process did not cache {task.wanted.source}",
                "the picture's folder must be shared by all machines; or leave out --cache_latents_to_disk",
            )


def remove_leftovers(files: Iterable[str]) -> int:
    """Delete temporary files that killed runs left beside cache files.

    Returns:
        how many.
    """
    oldest = time.time() - LEFTOVER_SECONDS
    removed = 0
    for folder in {os.path.dirname(file) for file in files}:
        for entry in os.scandir(folder):
            if entry.name.startswith(".") and entry.name.endswith(".partial.npz"):
                with suppress(OSError):
                    if entry.stat().st_mtime < oldest:
                        os.remove(entry.path)
                        removed += 1
    return removed


def _refuse_bad(bad: Sequence[UserError]) -> None:
    """Stop after the work where pictures could not be read; all of them are named."""
    if len(bad) == 1:
        raise bad[0]
    if bad:
        raise UnreadableFiles.of([file_and_reason(error) for error in bad])


def _cache_on_disk(
    same_stems: Sequence[Sequence[Task]], cacher: Cacher, bad: Sequence[UserError], share: Share, *, skip_check: bool
) -> CacheReport:
    report = CacheReport()
    moved, due = [], []
    for tasks in same_stems:
        for task, verdict in zip(tasks, choose_files(tasks, skip_check=skip_check), strict=True):
            report.count(verdict)
            if verdict not in (VALID, MOVED):
                due.append(task)
            elif verdict == MOVED:
                moved.append(task)
    share.wait()  # nobody writes before all have looked, so that all share out the same list
    if share.first:
        report.removed = remove_leftovers(task.path for tasks in same_stems for task in tasks)
    for task in share.own(moved):
        write_latents(task.path, read_latents(task.path), key_text(task.wanted, source_state(task.wanted.source)))
    due.sort(key=batch_group)
    own = share.own(due)
    require_room((task.path, task.file_bytes) for task in own)
    cacher.run(own, lambda task, entry, state: write_latents(task.path, entry, key_text(task.wanted, state)))
    _refuse_bad(bad)
    share.wait()
    mine = set(map(id, own))
    _require_made((task for task in due if id(task) not in mine), skip_check)
    for tasks in same_stems:
        for task in tasks:
            for dataset, index in task.users:
                dataset.items[index].latents_npz = task.file
    log.info("%s", report)
    return report


def _cache_in_memory(
    datasets: Sequence[Dataset], tasks: Sequence[Task], cacher: Cacher, bad: Sequence[UserError]
) -> CacheReport:
    entries: dict[int, CachedLatents] = {}
    cacher.run(tasks, lambda task, entry, state: entries.__setitem__(id(task), entry))
    _refuse_bad(bad)
    for dataset in datasets:
        dataset.memory_latents = [None for _ in dataset.items]
    for batch in encoding_batches(tasks, len(tasks) or 1):
        # One tensor per size: loader workers that are spawned share a few large blocks instead of many small ones.
        made = [entries.pop(id(task)) for task in batch]
        latents = torch.stack([entry.latents for entry in made])
        flipped = torch.stack([e.flipped for e in made if e.flipped is not None]) if batch[0].wanted.flip else None
        for i, (task, entry) in enumerate(zip(batch, made, strict=True)):
            entry = replace(entry, latents=latents[i], flipped=None if flipped is None else flipped[i])
            for dataset, index in task.users:
                assert dataset.memory_latents is not None
                dataset.memory_latents[index] = entry
    report = CacheReport(made=len(tasks))
    log.info("%s", report)
    return report


def cache_with_vae(
    datasets: Sequence[Any], vae: Any, batch_size: int, to_disk: bool, *, family: str = "sd", skip_check: bool = False
) -> CacheReport:
    """The same with a diffusers VAE, for callers that have no encoder of their own.

    With torch.distributed running the files are shared out over its processes.
    """
    rank, processes, wait = 0, 1, None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        wait = torch.distributed.barrier

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.sample()

    return cache_latents(
        datasets,
        encode,
        batch_size=batch_size,
        to_disk=to_disk,
        skip_check=skip_check,
        family=family,
        vae=fingerprint(vae),
        dtype=str(vae.dtype).removeprefix("torch."),
        rank=rank,
        processes=processes,
        wait=wait,
    )
