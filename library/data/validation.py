"""Held-out pictures: which ones they are, and the data sets that are made of them."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

from library.data.records import DatasetSettings, Item, ScanResult, SubsetSettings
from library.messages import UserError


def hold_out(items: Sequence[Item], settings: DatasetSettings, seed: int) -> tuple[list[Item], list[Item]]:
    """Training and validation pictures of one subset; every subset gives its share, each picture once.

    Args:
        items: the subset's pictures.
        settings: their data set, with `validation_split` and `validation_seed`.
        seed: decides where the data set has no seed of its own.

    Raises:
        UserError: the share is out of range.
    """
    if settings.is_validation:
        return [], _once(items)
    share = settings.validation_split
    if not 0 <= share <= 1:
        raise UserError(f"validation_split is {share}", "it must lie between 0 and 1")
    if share == 0 or not items:
        return list(items), []
    shuffled = list(items)
    random.Random(settings.validation_seed if settings.validation_seed is not None else seed).shuffle(shuffled)
    count = len(shuffled) - round(len(shuffled) * share)
    return sorted(shuffled[:count], key=_path), _once(sorted(shuffled[count:], key=_path))


def _path(item: Item) -> str:
    return item.path


def _once(items: Sequence[Item]) -> list[Item]:
    for item in items:
        item.repeats = 1
    return list(items)


def validation_parts(
    settings: Sequence[DatasetSettings], scans: Sequence[ScanResult]
) -> Iterator[tuple[DatasetSettings, ScanResult]]:
    """Settings and pictures of the validation data sets, for each data set that has held-out pictures."""
    for one, scan in zip(settings, scans, strict=True):
        if not scan.validation:
            continue
        counts = Counter(item.subset for item in scan.validation)
        yield (
            validation_settings(one),
            ScanResult(
                items=scan.validation,
                num_train_images=len(scan.validation),
                image_counts=[counts[index] for index in range(len(one.subsets))],
                bucket_sizes=scan.bucket_sizes,
            ),
        )


def trained_too(scans: Sequence[ScanResult]) -> list[str]:
    """Held-out pictures that another data set trains on, by path; their loss says nothing of new pictures."""
    folder = cache(os.path.realpath)  # links are looked up once a folder
    trained = {(folder(os.path.dirname(i.path)), os.path.basename(i.path)) for scan in scans for i in scan.items}
    held_out = [item.path for scan in scans for item in scan.validation]
    return [path for path in held_out if (folder(os.path.dirname(path)), os.path.basename(path)) in trained]


def validation_settings(settings: DatasetSettings) -> DatasetSettings:
    """The same data set without chance: whole captions in their own order, pictures cut in the middle, not mirrored."""
    subsets = tuple(_without_chance(subset, settings.enable_bucket) for subset in settings.subsets)
    return replace(settings, is_validation=True, validation_split=0.0, subsets=subsets)


def _without_chance(subset: SubsetSettings, enable_bucket: bool) -> SubsetSettings:
    return replace(
        subset,
        num_repeats=1,
        shuffle_caption=False,
        token_warmup_step=0,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        color_aug=False,
        flip_aug=False,
        # Without buckets, larger pictures are usable only when they are cut; the place is then the same every time.
        random_crop=subset.random_crop and not enable_bucket,
    )
