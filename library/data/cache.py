"""Caching latents: which files hold, which are made anew, pictures decoded ahead, files written behind.

The VAE is a callable that the caller passes in; nothing here knows a model.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from library.data import images
from library.data.buckets import Size, crop_ltrb
from library.data.dataset import Dataset
from library.data.latents_file import (
    ABSENT,
    MOVED,
    OTHER,
    VALID,
    CachedLatents,
    SourceState,
    Wanted,
    fingerprint,
    judge,
    key_text,
    read_latents,
    source_state,
    write_latents,
)
from library.data.sample import interpolation, picture_for_cache
from library.messages import UserError, log

Encode = Callable[[torch.Tensor], torch.Tensor]

PROGRESS_SECONDS = 30.0
PENDING_WRITES = 32


@dataclass(slots=True)
class Task:
    """One picture in one geometry.

    Attributes:
        wanted: what its latents should be.
        original: (width, height) of the picture file.
        users: (data set, item index) of those that use it.
        file: its cache file, once chosen.
    """

    wanted: Wanted
    original: Size
    users: list[tuple[Dataset, int]] = field(default_factory=list)
    file: str | None = None


@dataclass(slots=True)
class CacheReport:
    """What caching did, on this process.

    Attributes:
        what: the cache's name in messages.
        kept: files that held.
        made: entries of pictures that had none.
        rebuilt: reason -> files made anew.
    """

    what: str = "latent cache"
    kept: int = 0
    made: int = 0
    rebuilt: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = [f"{self.kept} kept"] if self.kept else []
        if self.rebuilt:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.rebuilt.items()))
            parts.append(f"{self.rebuilt.total()} rebuilt ({reasons})")
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

    Raises:
        UserError: latents cannot be cached with these settings, are not finite, or a file cannot be written.
    """
    members = [dataset for dataset in datasets if isinstance(dataset, Dataset)]
    for dataset in members:
        _check_cacheable(dataset)
    encoder = _Encoder(encode, encode_exact, batch_size, readers or min(8, os.cpu_count() or 1))
    folders = collect_tasks(members, family=family, vae=vae, dtype=dtype)
    if not to_disk:
        return _cache_in_memory(members, [task for tasks in folders for task in tasks], encoder)
    report = CacheReport()
    due: list[Task] = []
    for number, tasks in enumerate(folders):
        if number % processes == rank:
            due += choose_files(tasks, report, skip_check=skip_check)
    encoder.run(due, lambda task, entry, state: write_latents(_file(task), entry, key_text(task.wanted, state)))
    if wait is not None:
        wait()
    for number, tasks in enumerate(folders):
        if number % processes != rank and choose_files(tasks, CacheReport(), skip_check=skip_check):
            raise UserError(
                f"another process did not cache {tasks[0].wanted.source}",
                "the picture's folder must be shared by all machines; or leave out --cache_latents_to_disk",
            )
        for task in tasks:
            for dataset, index in task.users:
                dataset.items[index].latents_npz = task.file
    log.info("%s%s", report, f" (process {rank + 1} of {processes})" if processes > 1 else "")
    return report


def _check_cacheable(dataset: Dataset) -> None:
    for subset in dataset.subsets:
        option = "color_aug" if subset.color_aug else "random_crop" if subset.random_crop else None
        if option:
            where = subset.image_dir or subset.metadata_file or "a subset"
            raise UserError(
                f"latents cannot be cached with {option}, which {where} uses", f"turn off {option} or --cache_latents"
            )


def collect_tasks(
    datasets: Sequence[Dataset], *, family: str = "sd", vae: str = "", dtype: str = ""
) -> list[list[Task]]:
    """Every picture in every geometry once; those whose files could get the same name stand together.

    Items that are linked to a cache file already are left out.
    """
    by_stem: dict[str, dict[tuple, Task]] = {}
    for dataset in datasets:
        for index, item in enumerate(dataset.items):
            if item.latents_npz is not None:
                continue
            assert item.bucket is not None and item.resized is not None
            subset = dataset.subsets[item.subset]
            path = os.path.abspath(item.path)
            wanted = Wanted(
                path,
                item.bucket,
                item.resized,
                interpolation(dataset.settings, subset),
                subset.flip_aug,
                subset.alpha_mask,
                family,
                vae,
                dtype,
                item.orientation,
            )
            same = by_stem.setdefault(os.path.splitext(path)[0], {})
            task = same.setdefault(
                (path, item.bucket, item.resized, wanted.interpolation, item.orientation), Task(wanted, item.size)
            )
            task.users.append((dataset, index))
            # One file serves all: it has mirrored latents and a mask if anyone needs them.
            flip, alpha = task.wanted.flip or wanted.flip, task.wanted.alpha or wanted.alpha
            task.wanted = replace(task.wanted, flip=flip, alpha=alpha)
    return [list(tasks.values()) for tasks in by_stem.values()]


def file_names(task: Task) -> list[str]:
    """Possible cache files of a picture, best first.

    The original's name; the one of its later versions (size of the picture); and, so that two training sizes or two
    pictures that differ in extension alone do not take each other's file, names with the training size.
    """
    stem = os.path.splitext(task.wanted.source)[0]
    family = task.wanted.family
    (width, height), (bucket_width, bucket_height) = task.original, task.wanted.bucket
    later = f"{stem}_{width:04d}x{height:04d}_{family}.npz"
    by_bucket = f"_{bucket_width:04d}x{bucket_height:04d}_{family}.npz"
    return list(dict.fromkeys([f"{stem}.npz", later, stem + by_bucket, task.wanted.source + by_bucket]))


def choose_files(tasks: Sequence[Task], report: CacheReport, *, skip_check: bool = False) -> list[Task]:
    """Give each task of one stem its file.

    Returns:
        the tasks whose file must be made.
    """
    taken: set[str] = set()
    due = []
    for task in tasks:
        names = [name for name in file_names(task) if name not in taken]
        if not names:
            raise UserError(
                f"{task.wanted.source} is used in too many ways at once", "cache in memory, or split the run"
            )
        verdicts = {}
        for name in names:
            verdicts[name] = judge(name, task.wanted, skip_check=skip_check)
            if verdicts[name] in (VALID, MOVED):
                break
        good = [name for name in names if verdicts.get(name) in (VALID, MOVED)]
        task.file = good[0] if good else next((name for name in names if verdicts[name] != OTHER), names[-1])
        taken.add(task.file)
        verdict = verdicts[task.file]
        if good:
            report.kept += 1
            if verdict == MOVED:
                write_latents(
                    task.file, read_latents(task.file), key_text(task.wanted, source_state(task.wanted.source))
                )
            continue
        due.append(task)
        if verdict == ABSENT:
            report.made += 1
        else:
            report.rebuilt[verdict] += 1
    return due


def _file(task: Task) -> str:
    assert task.file is not None
    return task.file


def encoding_batches(tasks: Sequence[Task], batch_size: int) -> list[list[Task]]:
    """Batches of one training size and one way of flipping, small sizes first, each in the order of the tasks."""

    def group(task: Task) -> tuple:
        width, height = task.wanted.bucket
        return width * height, width, task.wanted.flip

    batches: list[list[Task]] = []
    for task in sorted(tasks, key=group):
        if batches and group(batches[-1][0]) == group(task) and len(batches[-1]) < batch_size:
            batches[-1].append(task)
        else:
            batches.append([task])
    return batches


@dataclass(frozen=True, slots=True)
class _Picture:
    """A decoded picture: float32 (3, H, W), mask, and the state of its file."""

    image: torch.Tensor
    mask: torch.Tensor | None
    state: SourceState


def _read(task: Task) -> _Picture:
    dataset, index = next(((d, i) for d, i in task.users if d.subsets[d.items[i].subset].alpha_mask), task.users[0])
    state = source_state(task.wanted.source)
    item = dataset.items[index]
    pixels = picture_for_cache(item, dataset.subsets[item.subset], dataset.settings)
    return _Picture(images.to_tensor(pixels[..., :3]), images.alpha_mask(pixels) if task.wanted.alpha else None, state)


Store = Callable[[Task, CachedLatents, SourceState], None]


class _Encoder:
    """Runs pictures through the VAE, with threads that decode ahead and store behind."""

    def __init__(self, encode: Encode, encode_exact: Encode | None, batch_size: int, readers: int) -> None:
        if batch_size < 1:
            raise UserError(f"vae_batch_size is {batch_size}", "set it to 1 or more")
        self.encode = encode
        self.encode_exact = encode_exact
        self.batch_size = batch_size
        self.readers = readers

    def run(self, tasks: Sequence[Task], store: Store) -> None:
        """Encode every task's picture; `store` is called in another thread."""
        if not tasks:
            return
        log.info("caching latents of %d pictures", len(tasks))
        pending: deque[Future] = deque()
        done, said = 0, time.monotonic()
        readers, writers = ThreadPoolExecutor(self.readers, "read"), ThreadPoolExecutor(2, "write")
        try:
            for batch, pictures in self._read_ahead(readers, encoding_batches(tasks, self.batch_size)):
                for task, entry, picture in self._entries(batch, pictures):
                    pending.append(writers.submit(store, task, entry, picture.state))
                while pending and (pending[0].done() or len(pending) > PENDING_WRITES):
                    pending.popleft().result()
                done += len(batch)
                if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    log.info("caching latents: %d of %d", done, len(tasks))
            for future in pending:
                future.result()
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown()

    def _read_ahead(
        self, pool: ThreadPoolExecutor, batches: Sequence[Sequence[Task]]
    ) -> Iterator[tuple[Sequence[Task], list[_Picture]]]:
        ahead = 2 * self.batch_size + self.readers
        queue: deque[tuple[Sequence[Task], list[Future[_Picture]]]] = deque()
        waiting = 0
        for batch in batches:
            queue.append((batch, [pool.submit(_read, task) for task in batch]))
            waiting += len(batch)
            while waiting > ahead:
                first, futures = queue.popleft()
                waiting -= len(first)
                yield first, [future.result() for future in futures]
        for first, futures in queue:
            yield first, [future.result() for future in futures]

    def _entries(
        self, batch: Sequence[Task], pictures: Sequence[_Picture]
    ) -> Iterator[tuple[Task, CachedLatents, _Picture]]:
        stack = torch.stack([picture.image for picture in pictures])
        latents = self._latents(stack, batch)
        flipped = self._latents(stack.flip(-1), batch) if batch[0].wanted.flip else None
        for i, (task, picture) in enumerate(zip(batch, pictures, strict=True)):
            ltrb = crop_ltrb(task.wanted.bucket, task.original)
            mirrored = None if flipped is None else flipped[i]
            yield task, CachedLatents(latents[i], task.original, ltrb, mirrored, picture.mask), picture

    @torch.no_grad()
    def _latents(self, pictures: torch.Tensor, batch: Sequence[Task]) -> torch.Tensor:
        latents = self.encode(pictures).detach().cpu()
        bad = ~torch.isfinite(latents).flatten(1).all(1)
        if bad.any() and self.encode_exact is not None:
            latents[bad] = self.encode_exact(pictures[bad]).detach().cpu().to(latents.dtype)
            bad = ~torch.isfinite(latents).flatten(1).all(1)
        if bad.any():
            names = [task.wanted.source for task, wrong in zip(batch, bad.tolist(), strict=True) if wrong]
            also = ", in float32 either" if self.encode_exact is not None else ""
            raise UserError(
                f"the VAE gives no finite latents for {', '.join(names)}{also}",
                "look at that picture, use --no_half_vae, or replace the VAE with --vae",
            )
        return latents


def _cache_in_memory(datasets: Sequence[Dataset], tasks: Sequence[Task], encoder: _Encoder) -> CacheReport:
    entries: dict[int, CachedLatents] = {}
    encoder.run(tasks, lambda task, entry, state: entries.__setitem__(id(task), entry))
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
