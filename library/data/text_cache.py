"""Caching text outputs: each caption is encoded once before the first step, and the text encoders can go.

The encoders are a callable that the caller passes in; nothing here knows a model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from library.data.cache import CacheReport, Share, remove_leftovers, require_room
from library.data.cacher import WriteBehind
from library.data.captions import MOST_VARIANTS
from library.data.dataset import Dataset
from library.data.latents_file import VALID
from library.data.records import CHANGING_CAPTIONS, Item
from library.data.text_file import FOREIGN, SUFFIX, CachedText, TextOrigin, judge, key_text, write_text
from library.messages import Progress, UserError, log, some

EncodeText = Callable[[list[str]], CachedText]

BATCH_SIZE = 16


@dataclass(slots=True)
class Task:
    """One picture's caption, or a caption in memory.

    Attributes:
        caption: what is encoded.
        users: (data set, item index) of those that use it.
        file: its cache file, once chosen.
    """

    caption: str
    users: list[tuple[Dataset, int]] = field(default_factory=list)
    file: str | None = None

    @property
    def path(self) -> str:
        """The chosen cache file."""
        assert self.file is not None
        return self.file


def require_fixed_captions(datasets: Sequence[Any]) -> None:
    """Refuse subsets whose captions change from one time to the next.

    Raises:
        UserError: names the setting and the folder.
    """
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            if not dataset.is_text_encoder_output_cacheable():
                raise UserError(
                    f"text outputs cannot be cached for {type(dataset).__name__}",
                    "leave --cache_text_encoder_outputs out",
                )
            continue
        for subset in dataset.subsets:
            name = subset.changing(CHANGING_CAPTIONS)
            if name:
                raise UserError(
                    f"text outputs cannot be cached with {name}, which {subset.source} uses: the caption would change",
                    f"turn off {name} or --cache_text_encoder_outputs",
                )
            if subset.caption_dropout_every_n_epochs:
                log.warning("caption_dropout_every_n_epochs has no effect: the text outputs are cached")
        many = [item.path for item in dataset.items if not dataset.caption_variants(item)]
        if many:
            raise UserError(
                f"text outputs cannot be cached: {len(many)} captions have more than {MOST_VARIANTS} forms "
                f"({some(many)})",
                "give them fewer {a|b} or lines, or leave --cache_text_encoder_outputs out",
            )


def cache_text_outputs(
    datasets: Sequence[Any],
    encode: EncodeText,
    origin: TextOrigin,
    *,
    to_disk: bool = False,
    skip_check: bool = False,
    batch_size: int = BATCH_SIZE,
    rank: int = 0,
    processes: int = 1,
    wait: Callable[[], None] | None = None,
) -> CacheReport:
    """Make or find the text outputs of every picture and hand them to the data sets.

    Args:
        datasets: members of a group; only `Dataset`s have captions to cache, others are left alone.
        encode: captions -> their outputs, one row each, on any device.
        origin: what `encode` computes with, for the files' keys; files of another origin are made anew.
        to_disk: keep them in `_te_outputs.npz` files beside the pictures instead of memory.
        skip_check: an existing file is taken without a look inside.
        batch_size: captions a call.
        rank, processes: this process and how many there are.
        wait: returns when every process has called it; needed with several processes on disk.

    Raises:
        UserError: captions change, outputs are not finite, or a file cannot be written.
    """
    members = [dataset for dataset in datasets if isinstance(dataset, Dataset)]
    require_fixed_captions(members)
    if not to_disk:
        return _cache_in_memory(members, encode, batch_size)
    report = CacheReport("text output cache")
    share = Share(rank, processes, wait)
    tasks = [task for same in text_tasks(members) for task in same]
    due = _due(tasks, origin, report, skip_check=skip_check)
    share.wait()  # nobody writes before all have looked, so that all share out the same list
    if share.first:
        report.removed = remove_leftovers(task.path for task in tasks)
    by_caption: dict[str, list[Task]] = {}
    for task in due:
        by_caption.setdefault(task.caption, []).append(task)
    own = share.own(list(by_caption))
    require_room((task.path, origin.file_bytes) for caption in own for task in by_caption[caption])

    def store(caption: str, entry: CachedText) -> None:
        for task in by_caption[caption]:
            write_text(task.path, entry, key_text(caption, origin))

    _encode_all(own, encode, batch_size, store)
    share.wait()
    others = by_caption.keys() - set(own)
    for task in (task for task in due if task.caption in others):
        if judge(task.path, task.caption, origin, skip_check=skip_check) not in (VALID, FOREIGN):
            raise UserError(
                f"another process did not make {task.path}",
                "the folder must be shared by all machines; or leave out --cache_text_encoder_outputs_to_disk",
            )
    for task in tasks:
        for dataset, index in task.users:
            _link(dataset, dataset.items[index], task)
    log.info("%s", report)
    return report


def _link(dataset: Dataset, item: Item, task: Task) -> None:
    """Tell an item the file of its caption, or of one of its captions."""
    item.text_npz = task.path
    if dataset.subsets[item.subset].enable_wildcard:
        item.text_variants = {**(item.text_variants or {}), task.caption: task.path}


def unknown_origin(dataset: Dataset) -> TextOrigin:
    """What is known of the text outputs of a data set without the text encoders: their length."""
    return TextOrigin((dataset.settings.max_token_length or 75) + 2)


def text_tasks(datasets: Sequence[Dataset]) -> list[list[Task]]:
    """Every caption of every picture once, with its file; those of one file name stand together.

    A picture with two captions (lines and wildcards, or two folders of one data-set file that are the same) gets a
    second file name, and so do two pictures that differ in extension alone.
    """
    by_stem: dict[str, dict[str, Task]] = {}
    for dataset in datasets:
        for index, item in enumerate(dataset.items):
            stem = os.path.splitext(os.path.abspath(item.path))[0]
            same = by_stem.setdefault(stem, {})
            for caption in dataset.caption_variants(item):
                same.setdefault(caption, Task(caption)).users.append((dataset, index))
    for stem, same in by_stem.items():
        for number, task in enumerate(same.values()):
            mark = hashlib.blake2b(task.caption.encode(), digest_size=4).hexdigest()
            task.file = stem + (f"_{mark}" if number else "") + SUFFIX
    return [list(same.values()) for same in by_stem.values()]


def _due(tasks: Sequence[Task], origin: TextOrigin, report: CacheReport, *, skip_check: bool) -> list[Task]:
    """The tasks whose file must be made."""
    due, foreign = [], 0
    for task in tasks:
        verdict = judge(task.path, task.caption, origin, skip_check=skip_check)
        foreign += verdict == FOREIGN
        report.count(VALID if verdict == FOREIGN else verdict)
        if verdict not in (VALID, FOREIGN):
            due.append(task)
    if foreign:
        log.warning(
            "%d text cache files come from another program, which did not note their captions; "
            "delete them if captions were edited since",
            foreign,
        )
    return due


def _encode_all(
    texts: Sequence[str], encode: EncodeText, batch_size: int, store: Callable[[str, CachedText], None]
) -> None:
    """Encode each caption once; `store` gets the outputs, on the CPU, in other threads."""
    if not texts:
        return
    with Progress(len(texts), "caching text outputs") as progress, WriteBehind() as writers:
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            outputs = CachedText(*(None if t is None else t.detach().cpu() for t in encode(batch).tensors()))
            for row, text in enumerate(batch):
                entry = outputs.row(row)
                if not all(torch.isfinite(t).all() for t in entry.tensors() if t is not None):
                    raise UserError(
                        f"the text encoders give values that are not finite for the caption {text[:80]!r}",
                        "use --mixed_precision bf16 or no",
                    )
                writers.submit(store, text, entry)
            progress.update(len(batch))


def _cache_in_memory(datasets: Sequence[Dataset], encode: EncodeText, batch_size: int) -> CacheReport:
    texts = [
        list(dict.fromkeys(text for item in dataset.items for text in dataset.caption_variants(item)))
        for dataset in datasets
    ]
    unique = list(dict.fromkeys(text for members in texts for text in members))
    by_text: dict[str, CachedText] = {}
    _encode_all(unique, encode, batch_size, by_text.__setitem__)
    entries = [by_text[text] for text in unique]
    # One tensor of each kind: loader workers that are spawned share a few large blocks instead of many small ones.
    columns = zip(*(entry.tensors() for entry in entries), strict=True)
    stacked = (
        CachedText(*(None if column[0] is None else torch.stack(column) for column in columns)) if entries else None
    )
    place = {text: number for number, text in enumerate(unique)}
    for dataset, members in zip(datasets, texts, strict=True):
        dataset.memory_text = {text: stacked.row(place[text]) for text in members} if stacked is not None else None
    report = CacheReport("text output cache", made=len(unique))
    log.info("%s", report)
    return report
