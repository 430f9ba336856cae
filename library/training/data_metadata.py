"""What a network file tells about the pictures it was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from library.data.manifest import manifest_hash

if TYPE_CHECKING:
    from library.options.parser import Resolved

Named = list[tuple[str, dict[str, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """One data set, this program's own or one of `--dataset_class`.

    Attributes:
        settings: the object with `kind`, `batch_size`, bucket and resize settings as far as it has them.
        resolution: (width, height), or None.
        subsets: (subset, pictures found in it); subsets without pictures are left out.
        tag_frequency: folder -> tag -> count.
        bucket_info: buckets and mean aspect error, None without buckets.
        limits: smallest and largest bucket side, (None, None) without buckets.
    """

    settings: Any
    resolution: tuple[int, int] | None
    subsets: list[tuple[Any, int]]
    num_train_images: int
    num_reg_images: int
    tag_frequency: Mapping[str, Mapping[str, int]]
    bucket_info: Any
    limits: tuple[int | None, int | None]


def facts_of(dataset: Any) -> DatasetFacts:
    """What the metadata needs of a data set object."""
    dataset = getattr(dataset, "core", None) or dataset
    settings = dataset.settings if hasattr(dataset, "image_counts") else dataset
    subsets = list(settings.subsets)
    counts = getattr(dataset, "image_counts", None) or [subset.img_count for subset in subsets]
    width, height = getattr(settings, "resolution", None) or (
        getattr(dataset, "width", None),
        getattr(dataset, "height", None),
    )
    limited = settings if getattr(settings, "enable_bucket", False) else None
    limits = (getattr(limited, "min_bucket_reso", None), getattr(limited, "max_bucket_reso", None))
    return DatasetFacts(
        settings=settings,
        resolution=(width, height) if width and height else None,
        subsets=[(subset, count) for subset, count in zip(subsets, counts, strict=True) if count],
        num_train_images=dataset.num_train_images,
        num_reg_images=dataset.num_reg_images,
        tag_frequency=getattr(dataset, "tag_frequency", None) or {},
        bucket_info=getattr(dataset, "bucket_info", None),
        limits=getattr(dataset, "bucket_limits", limits),
    )


def common_resolution(datasets: Sequence[Any]) -> tuple[int, int] | None:
    """(width, height) of the data sets if they all have the same."""
    sizes = {facts_of(dataset).resolution for dataset in datasets}
    return sizes.pop() if len(sizes) == 1 else None


def manifest_metadata(datasets: Sequence[Any]) -> dict[str, str]:
    """The hash that `tools/inspect_dataset.py` shows for the same pictures; nothing for foreign data sets."""
    cores = [getattr(dataset, "core", None) or dataset for dataset in datasets]
    if not all(hasattr(core, "items") for core in cores):
        return {}
    return {"ss_dataset_manifest_hash": manifest_hash(item for core in cores for item in core.items)}


def single_dataset_metadata(options: Resolved, processes: int, dataset: DatasetFacts) -> dict[str, Any]:
    """The form without `--dataset_config`: the options' values, and one data set's pictures."""
    config = options.dataset
    names = "color_aug flip_aug random_crop shuffle_caption keep_tokens enable_bucket bucket_no_upscale"
    train, regularisation = _folders(dataset)
    return {
        **{f"ss_{name}": getattr(config, name) for name in names.split()},
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_total_batch_size": config.train_batch_size * processes * options.loop.gradient_accumulation_steps,
        "ss_resolution": dataset.resolution,
        "ss_min_bucket_reso": dataset.limits[0],
        "ss_max_bucket_reso": dataset.limits[1],
        "ss_dataset_dirs": json.dumps(dict(train)),
        "ss_reg_dataset_dirs": json.dumps(dict(regularisation)),
        "ss_tag_frequency": json.dumps(dataset.tag_frequency),
        "ss_bucket_info": json.dumps(dataset.bucket_info),
    }


def config_file_metadata(datasets: Sequence[DatasetFacts]) -> dict[str, str]:
    """The form with `--dataset_config`: one object a data set, and all tags and folders together."""
    tags: dict[str, Any] = {}
    folders: dict[str, Any] = {}
    for dataset in datasets:
        for folder, frequency in dataset.tag_frequency.items():
            tags.setdefault(folder, frequency)
        for folder, counts in _folders(dataset)[0]:
            folders[_unused(folder, folders)] = counts
    return {
        "ss_datasets": json.dumps([_dataset_object(dataset) for dataset in datasets]),
        "ss_tag_frequency": json.dumps(tags),
        "ss_dataset_dirs": json.dumps(folders),
    }


def _dataset_object(dataset: DatasetFacts) -> dict[str, Any]:
    settings = dataset.settings
    return {
        "is_dreambooth": settings.kind == "dreambooth",
        "batch_size_per_device": settings.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": dataset.resolution,
        "enable_bucket": settings.enable_bucket,
        "min_bucket_reso": dataset.limits[0],
        "max_bucket_reso": dataset.limits[1],
        "resize_interpolation": settings.resize_interpolation,
        "tag_frequency": dataset.tag_frequency,
        "bucket_info": dataset.bucket_info,
        "subsets": [_subset_object(subset, count) for subset, count in dataset.subsets],
    }


def _subset_object(subset: Any, count: int) -> dict[str, Any]:
    names = (
        "num_repeats color_aug flip_aug random_crop shuffle_caption keep_tokens keep_tokens_separator "
        "secondary_separator enable_wildcard caption_prefix caption_suffix resize_interpolation"
    )
    values = {"img_count": count, **{name: getattr(subset, name) for name in names.split()}}
    if subset.image_dir:
        values["image_dir"] = base_name(subset.image_dir)
    if subset.kind == "dreambooth":
        values |= {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    if subset.metadata_file:
        values["metadata_file"] = base_name(subset.metadata_file)
    return values


def _folders(dataset: DatasetFacts) -> tuple[Named, Named]:
    """(name, counts) of folders or metadata files with training pictures, and of those for regularisation."""
    train: Named = []
    regularisation: Named = []
    for subset, count in dataset.subsets:
        name = base_name(getattr(subset, "metadata_file", None) or subset.image_dir)
        group = regularisation if getattr(subset, "is_reg", False) else train
        group.append((name, {"n_repeats": subset.num_repeats, "img_count": count}))
    return train, regularisation


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, or `name (2)`, `name (3)`, ... when it is taken."""
    number, free = 2, name
    while free in taken:
        free = f"{name} ({number})"
        number += 1
    return free


def base_name(path: str | os.PathLike[str]) -> str:
    """Last part of a path, a trailing slash or not."""
    return PurePath(path).name
