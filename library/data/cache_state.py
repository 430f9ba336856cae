"""State of the caches without a model: what holds, what is missing or stale, and the disk space it takes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from library.data.cache_tasks import choose_files, collect_tasks
from library.data.dataset import Dataset
from library.data.latents_file import ABSENT, MOVED, OTHER, VALID
from library.data.text_cache import text_tasks, unknown_origin
from library.data.text_file import FOREIGN
from library.data.text_file import judge as judge_text


@dataclass(slots=True)
class Holdings:
    """The cache files of one kind that a data set uses or would use.

    Attributes:
        valid: files that hold as far as can be told without the model.
        missing: files that are not there.
        stale: reason -> files that are there and would be made anew, such as `picture changed` or `broken file`.
        bytes_on_disk: size of the files that are there.
        bytes_needed: what the missing files will take.
    """

    valid: int = 0
    missing: int = 0
    stale: Counter[str] = field(default_factory=Counter)
    bytes_on_disk: int = 0
    bytes_needed: int = 0

    def count(self, path: str, verdict: str, size: int) -> None:
        """Count one file by `judge`'s verdict; `size` is what it will take where it is missing."""
        if verdict in (VALID, MOVED, FOREIGN):
            self.valid += 1
        elif verdict in (ABSENT, OTHER):
            self.missing += 1
        else:
            self.stale[verdict] += 1
        if verdict in (ABSENT, OTHER):
            self.bytes_needed += size
        elif os.path.exists(path):
            self.bytes_on_disk += os.path.getsize(path)


@dataclass(frozen=True, slots=True)
class CacheState:
    """Caches of one data set.

    Attributes:
        latents: None where latents cannot be cached (`color_aug`, `random_crop`).
        text: the same of text outputs; None also for families that do not cache them.
    """

    latents: Holdings | None = None
    text: Holdings | None = None


def cache_state(datasets: Sequence[Any], family: str = "sd") -> list[CacheState]:
    """What the caches of each data set hold; nothing is written.

    Args:
        datasets: members of a group; others than `Dataset`s have an empty state.
        family: `sd` or `sdxl`; SD models do not cache text outputs.

    Returns:
        one state for each data set, in their order.
    """
    members = [dataset for dataset in datasets if isinstance(dataset, Dataset)]
    latents = {id(one): Holdings() for one in members if one.is_latent_cacheable()}
    texts = {id(one): Holdings() for one in members if family == "sdxl" and one.is_text_encoder_output_cacheable()}
    _count_linked(members, latents)
    for tasks in collect_tasks([one for one in members if id(one) in latents], family=family):
        for task, verdict in zip(tasks, choose_files(tasks), strict=True):
            for user in {id(dataset) for dataset, _ in task.users}:
                latents[user].count(task.path, verdict, task.file_bytes)
    for one in members:
        if id(one) in texts:
            _count_text(one, texts[id(one)])
    return [CacheState(latents.get(id(one)), texts.get(id(one))) for one in datasets]


def _count_linked(members: Sequence[Dataset], latents: dict[int, Holdings]) -> None:
    """Pictures that came with a cache file, from metadata."""
    for dataset in members:
        for item in dataset.items:
            if item.latents_npz is not None and id(dataset) in latents:
                latents[id(dataset)].count(item.latents_npz, VALID, 0)


def _count_text(dataset: Dataset, holdings: Holdings) -> None:
    origin = unknown_origin(dataset)
    for tasks in text_tasks([dataset]):
        for task in tasks:
            holdings.count(task.path, judge_text(task.path, task.caption, origin), origin.file_bytes)
