"""What latent caching has to do: every picture in every geometry once, and the file that holds its latents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from library.data.buckets import Size
from library.data.dataset import Dataset
from library.data.latents_file import FILE_BYTES, FLOAT_BYTES, MOVED, OTHER, VALID, Wanted, judge
from library.data.records import CHANGING_PICTURES
from library.data.sample import interpolation
from library.messages import UserError

LATENT_CHANNELS = 4


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

    @property
    def path(self) -> str:
        """The chosen cache file."""
        assert self.file is not None
        return self.file

    @property
    def file_bytes(self) -> int:
        """About the size of its cache file."""
        width, height = self.wanted.bucket
        values = LATENT_CHANNELS * (width // 8) * (height // 8) * (2 if self.wanted.flip else 1)
        if self.wanted.alpha:
            values += width * height
        return FLOAT_BYTES * values + FILE_BYTES


def require_fixed_pictures(datasets: Sequence[Any]) -> None:
    """Refuse subsets that change their pictures at random, and data sets of others that cannot be cached.

    Raises:
        UserError: names the setting and the folder.
    """
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            if not dataset.is_latent_cacheable():
                raise UserError(f"latents cannot be cached for {type(dataset).__name__}", "leave --cache_latents out")
            continue
        for subset in dataset.subsets:
            option = subset.changing(CHANGING_PICTURES)
            if option:
                raise UserError(
                    f"latents cannot be cached with {option}, which {subset.source} uses",
                    f"turn off {option} or --cache_latents",
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
            if (flip, alpha) != (task.wanted.flip, task.wanted.alpha):
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


def choose_files(tasks: Sequence[Task], *, skip_check: bool = False) -> list[str]:
    """Give each task of one stem its file; nothing is written.

    Returns:
        for each task what its file is now, see `library.data.latents_file.judge`.
    """
    taken: set[str] = set()
    chosen = []
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
        chosen.append(verdicts[task.file])
    return chosen


def encoding_batches(tasks: Sequence[Task], batch_size: int) -> list[list[Task]]:
    """Batches of one training size and one way of flipping, small sizes first, each in the order of the tasks."""
    batches: list[list[Task]] = []
    for task in sorted(tasks, key=batch_group):
        if batches and batch_group(batches[-1][0]) == batch_group(task) and len(batches[-1]) < batch_size:
            batches[-1].append(task)
        else:
            batches.append([task])
    return batches


def batch_group(task: Task) -> tuple:
    """What pictures of one batch have in common, ascending by area."""
    width, height = task.wanted.bucket
    return width * height, width, task.wanted.flip
