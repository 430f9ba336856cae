"""The data-set report: what is trained on, before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from library.data.buckets import Buckets, size_text
from library.data.records import DatasetSettings, Item, changed_settings

# Told in words of their own, or of no interest when they are set.
_TOLD = {"kind", "image_dir", "metadata_file", "num_repeats", "is_reg"}


class Described(Protocol):
    """What the report needs to know of a data set."""

    @property
    def settings(self) -> DatasetSettings: ...
    @property
    def items(self) -> Sequence[Item]: ...
    @property
    def buckets(self) -> Buckets: ...
    @property
    def image_counts(self) -> Sequence[int]: ...
    @property
    def num_train_images(self) -> int: ...
    @property
    def num_reg_images(self) -> int: ...


def describe(datasets: Sequence[Any]) -> list[str]:
    """The report, a line each: settings, subsets with picture counts, repeats, buckets with batches.

    Args:
        datasets: members of a group; those of foreign classes get one line.
    """
    lines = []
    for number, member in enumerate(datasets, 1):
        dataset: Described | None = getattr(member, "core", member)
        if dataset is None or not hasattr(dataset, "settings"):
            lines.append(f"data set {number}: {type(member).__name__}, {len(member)} batches")
            continue
        lines.append(f"data set {number}: {_settings_text(dataset.settings)}")
        lines += (f"  {text}" for text in _subset_lines(dataset))
        lines.append(f"  {_sum_text(dataset)}")
        lines += (f"  {text}" for text in _bucket_lines(dataset))
    return lines


def _settings_text(settings: DatasetSettings) -> str:
    parts = [
        settings.kind,
        f"resolution {size_text(settings.resolution)}" if settings.resolution else "sizes from the metadata",
        f"batch size {settings.batch_size}",
        *([_bucket_text(settings)] if settings.resolution else []),
    ]
    for name in ("resize_interpolation", "validation_split", "validation_seed", "max_token_length"):
        value = getattr(settings, name)
        if value:
            parts.append(f"{name} {value}")
    if settings.network_multiplier != 1:
        parts.append(f"network_multiplier {settings.network_multiplier}")
    return ", ".join(parts)


def _bucket_text(settings: DatasetSettings) -> str:
    if not settings.enable_bucket:
        return "no buckets"
    if settings.bucket_no_upscale:
        return f"buckets by the pictures' own sizes, steps of {settings.bucket_reso_steps}, never enlarged"
    low, high, step = settings.min_bucket_reso, settings.max_bucket_reso, settings.bucket_reso_steps
    return f"buckets with sides from {low} to {high} in steps of {step}"


def _subset_lines(dataset: Described) -> Iterator[str]:
    for subset, count in zip(dataset.settings.subsets, dataset.image_counts, strict=True):
        kind = ", regularisation" if subset.is_reg else ""
        changed = changed_settings(subset, leave_out=_TOLD).items()
        settings = "".join(f", {name}" if value is True else f", {name} {_shown(value)}" for name, value in changed)
        used = f"{count} pictures x {subset.num_repeats} repeats" if count else "left out"
        source = subset.source
        if subset.metadata_file and subset.image_dir:
            source += f" with pictures in {subset.image_dir}"
        yield f"{source}: {used}{kind}{settings}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, dict)) else str(value)


def _sum_text(dataset: Described) -> str:
    batches = dataset.buckets.batch_count(dataset.settings.batch_size)
    text = f"{dataset.num_train_images} training pictures per epoch, repeats counted"
    reg = [item.repeats for item in dataset.items if item.is_reg]
    if reg:
        text += (
            f", and as many regularisation pictures ({sum(reg)} uses of {len(reg)} pictures, loss weight "
            f"{dataset.settings.prior_loss_weight}), which doubles the steps"
        )
    return f"{text}; {batches} batches on one process"


def _bucket_lines(dataset: Described) -> Iterator[str]:
    settings, buckets = dataset.settings, dataset.buckets
    if not settings.enable_bucket:
        return
    pictures = Counter(item.bucket for item in dataset.items)
    for index, (size, members) in enumerate(zip(buckets.sizes, buckets.members, strict=True)):
        batches = -(-len(members) // settings.batch_size)
        yield (
            f"bucket {index}: {size_text(size)}, {len(members)} uses of {pictures[size]} pictures, {batches} batches"
        )
    yield f"mean difference of aspect ratio between picture and bucket: {buckets.mean_ratio_error:.4f}"
