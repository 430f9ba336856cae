"""Resolves data-set file and options into settings: each value from subset, data set, general, option or default."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from library.data import config_file
from library.data.config_schema import (
    DATASET_KEYS,
    DATASET_ONLY_KEYS,
    DROPOUT_KEYS,
    SHARED_KEYS,
    SUBSET_KEYS,
    Support,
    check,
    kind_of,
    own_keys,
)
from library.data.folders import required_tables
from library.data.records import DatasetSettings, Size, SubsetSettings
from library.messages import UserError, log
from library.options.dataset import DatasetConfig

__all__ = ["Support", "parse_face_range", "parse_resolution", "resolve", "resolve_datasets"]

# Options whose names differ from the keys.
OPTION_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
FOLDER_OPTIONS = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")


def resolve_datasets(
    dataset: DatasetConfig, *, support: Support, max_token_length: int | None = None
) -> tuple[DatasetSettings, ...]:
    """The data sets that a command line describes, by `--dataset_config` or by folder options.

    Args:
        dataset: the options.
        support: what the script accepts.
        max_token_length: option of the model concern that data sets carry along.

    Raises:
        UserError: nothing is given, something is missing or wrong; a file's problems are listed together.
    """
    options = options_of(dataset)
    options["max_token_length"] = max_token_length
    if dataset.dataset_config is None:
        return resolve({"datasets": [{"subsets": _subsets_from_options(dataset, support)}]}, options, support)
    ignored = [f"--{name}" for name in FOLDER_OPTIONS if getattr(dataset, name)]
    if ignored:
        log.warning("not used because --dataset_config is given: %s", ", ".join(ignored))
    config = config_file.read(dataset.dataset_config)
    problems = check(config, support)
    if problems:
        raise config_file.refusal(dataset.dataset_config, problems)
    if not config.get("datasets"):
        raise UserError(
            f"no datasets in {dataset.dataset_config}", "add a [[datasets]] table with a [[datasets.subsets]] table"
        )
    return resolve(config, options, support)


def options_of(dataset: DatasetConfig) -> dict[str, Any]:
    """Option values by key, as the last fallback before the defaults.

    Raises:
        UserError: resolution or face range cannot be read.
    """
    values = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    if values.get("caption_extention"):
        values["caption_extension"] = values["caption_extention"]
    values["resolution"] = parse_resolution(values["resolution"])
    values["face_crop_aug_range"] = parse_face_range(values["face_crop_aug_range"])
    values["skip_image_resolution"] = parse_resolution(values["skip_image_resolution"], "skip_image_resolution")
    return {key: values.get(OPTION_NAMES.get(key, key)) for key in {*values, *OPTION_NAMES}}


def resolve(config: Mapping[str, Any], options: Mapping[str, Any], support: Support) -> tuple[DatasetSettings, ...]:
    """Settings from the contents of a data-set file that was checked, and option values by key."""
    general = config.get("general", {})
    return tuple(_resolve_dataset(table, general, options, support) for table in config.get("datasets", ()))


def parse_resolution(text: str | Sequence[int] | None, name: str = "resolution") -> Size | None:
    """`512` -> (512, 512), `768,512` -> (768, 512) (width, height); a pair is handed on.

    Raises:
        UserError: not one or two whole numbers.
    """
    if text is None:
        return None
    parts = text.split(",") if isinstance(text, str) else [text] if isinstance(text, int) else list(text)
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UserError(f"--{name} {text} cannot be read", "give one number or WIDTH,HEIGHT, such as 768,512")
    return numbers[0], numbers[-1]


def parse_face_range(text: str | Sequence[float] | None) -> tuple[float, float] | None:
    """`1.0,3.0` -> (1.0, 3.0); a pair is handed on.

    Raises:
        UserError: not two numbers, the first not larger than the second.
    """
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in (text.split(",") if isinstance(text, str) else text))
    except ValueError:
        numbers = ()
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise UserError(f"--face_crop_aug_range {text} cannot be read", "give MIN,MAX, such as 1.0,3.0")
    return numbers[0], numbers[1]


def search(key: str, tables: Iterable[Mapping[str, Any]], default: Any = None) -> Any:
    """The first value of a key that is there and not None."""
    for table in tables:
        value = table.get(key)
        if value is not None:
            return value
    return default


def _resolve_dataset(
    table: Mapping[str, Any], general: Mapping[str, Any], options: Mapping[str, Any], support: Support
) -> DatasetSettings:
    subsets = table.get("subsets", ())
    kind = kind_of(subsets, support)
    assert kind is not None, "mixed kinds were refused by check"
    values = _found((*DATASET_KEYS, "resize_interpolation"), (table, general, options))
    values |= _found(("prior_loss_weight", "max_token_length", "debug_dataset"), (options,))
    values |= {key: table[key] for key in DATASET_ONLY_KEYS if key in table}
    for key in ("resolution", "skip_image_resolution"):
        if values.get(key) is not None:
            values[key] = parse_resolution(values[key], key)
    chain = (table, general, options)
    return DatasetSettings(
        **values, kind=kind, subsets=tuple(_resolve_subset(subset, kind, chain, support) for subset in subsets)
    )


def _resolve_subset(
    subset: Mapping[str, Any], kind: str, chain: Sequence[Mapping[str, Any]], support: Support
) -> SubsetSettings:
    keys = (*SUBSET_KEYS, *SHARED_KEYS[kind], *(DROPOUT_KEYS if support.dropout else ()))
    values = _found(keys, (subset, *chain))
    # These may stand in the subset alone, so nothing above it is asked except the option.
    values |= _found(own_keys(support, kind), (subset,))
    if "alpha_mask" in own_keys(support, kind):
        values |= _found(("alpha_mask",), (subset, chain[-1]))
    if values.get("face_crop_aug_range") is not None:
        values["face_crop_aug_range"] = tuple(values["face_crop_aug_range"])
    return SubsetSettings(**values, kind=kind)


def _found(keys: Iterable[str], tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = {key: search(key, tables) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def _subsets_from_options(dataset: DatasetConfig, support: Support) -> list[dict[str, Any]]:
    """Subset tables from folder options.

    Raises:
        UserError: a folder or option is missing.
    """
    if support.controlnet and not support.dreambooth and not support.finetuning:
        return [_pairs_from_options(dataset)]
    if support.finetuning and (dataset.in_json or not support.dreambooth):
        return [_metadata_from_options(dataset, support)]
    if not dataset.train_data_dir:
        raise UserError("no training pictures are given", "set --train_data_dir or --dataset_config")
    tables = required_tables(dataset.train_data_dir, "--train_data_dir")
    tables = [_with_masks(table, dataset, support) for table in tables]
    if dataset.reg_data_dir:
        tables += required_tables(dataset.reg_data_dir, "--reg_data_dir", is_reg=True)
    # One use per epoch is the folder's word, not that of --dataset_repeats, which is for --in_json.
    return tables


def _with_masks(table: dict[str, Any], dataset: DatasetConfig, support: Support) -> dict[str, Any]:
    """The subset with its folder of masks: one of the same name in `--conditioning_data_dir`, or that itself."""
    if not (support.masks and dataset.conditioning_data_dir):
        return table
    folder = dataset.conditioning_data_dir
    if table.get("image_dir"):
        own = os.path.join(folder, os.path.basename(os.path.normpath(table["image_dir"])))
        folder = own if os.path.isdir(own) else folder
    return {**table, "conditioning_data_dir": folder}


def _metadata_from_options(dataset: DatasetConfig, support: Support) -> dict[str, Any]:
    if not dataset.in_json:
        raise UserError("--in_json is missing", "give the metadata file, or a --dataset_config")
    table = {"metadata_file": dataset.in_json}
    if dataset.train_data_dir:
        table["image_dir"] = dataset.train_data_dir
    return _with_masks(table, dataset, support)


def _pairs_from_options(dataset: DatasetConfig) -> dict[str, Any]:
    for name in ("train_data_dir", "conditioning_data_dir"):
        if not getattr(dataset, name):
            raise UserError(f"--{name} is missing", "give the folder, or a --dataset_config")
    return {
        "image_dir": dataset.train_data_dir,
        "conditioning_data_dir": dataset.conditioning_data_dir,
        "num_repeats": 1,
    }
