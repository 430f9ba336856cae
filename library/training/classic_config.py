"""Data-set configuration in the form third parties know: sanitizer, blueprints, and data sets made from them.

Adapters over `library.data.config`; the program itself goes straight from options to settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import voluptuous

from library.data import config, config_file
from library.data.config_schema import Problem, Support, check
from library.data.folders import subset_tables
from library.data.group import DatasetGroup
from library.data.records import DatasetSettings, SubsetSettings
from library.data.report import describe
from library.messages import UserError, log
from library.options.dataset import DatasetConfig
from library.training.classic_base import BaseDataset
from library.training.classic_datasets import ControlNetDataset, DreamBoothDataset, FineTuningDataset

Size = tuple[int, int]


@dataclass
class BaseSubsetParams:
    """Resolved settings of a subset; field names are config keys."""

    image_dir: str | None = None
    num_repeats: int = 1
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    color_aug: bool = False
    flip_aug: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    random_crop: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    custom_attributes: dict[str, Any] | None = None
    resize_interpolation: str | None = None


@dataclass
class DreamBoothSubsetParams(BaseSubsetParams):
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    cache_info: bool = False
    alpha_mask: bool = False


@dataclass
class FineTuningSubsetParams(BaseSubsetParams):
    metadata_file: str | None = None
    alpha_mask: bool = False


@dataclass
class ControlNetSubsetParams(BaseSubsetParams):
    conditioning_data_dir: str | None = None
    caption_extension: str = ".caption"
    cache_info: bool = False


@dataclass
class BaseDatasetParams:
    """Resolved settings of a data set; `resolution` is (width, height)."""

    tokenizer: Any = None
    max_token_length: int | None = None
    resolution: Size | None = None
    debug_dataset: bool = False
    network_multiplier: float = 1.0


@dataclass
class FineTuningDatasetParams(BaseDatasetParams):
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


@dataclass
class ControlNetDatasetParams(FineTuningDatasetParams):
    pass


@dataclass
class DreamBoothDatasetParams(FineTuningDatasetParams):
    prior_loss_weight: float = 1.0


@dataclass
class SubsetBlueprint:
    params: BaseSubsetParams


@dataclass
class DatasetBlueprint:
    is_dreambooth: bool
    is_controlnet: bool
    params: BaseDatasetParams
    subsets: Sequence[SubsetBlueprint] = field(default_factory=list)


@dataclass
class DatasetGroupBlueprint:
    datasets: Sequence[DatasetBlueprint]


@dataclass
class Blueprint:
    dataset_group: DatasetGroupBlueprint


PARAMS: Mapping[str, tuple[type[BaseDatasetParams], type[BaseSubsetParams]]] = {
    "dreambooth": (DreamBoothDatasetParams, DreamBoothSubsetParams),
    "finetuning": (FineTuningDatasetParams, FineTuningSubsetParams),
    "controlnet": (ControlNetDatasetParams, ControlNetSubsetParams),
}
Params = TypeVar("Params")


class ConfigSanitizer:
    """Checks a data-set configuration and the options beside it."""

    def __init__(
        self, support_dreambooth: bool, support_finetuning: bool, support_controlnet: bool, support_dropout: bool
    ) -> None:
        """
        Raises:
            ValueError: no kind of data set is supported.
        """
        self.support = Support(
            dreambooth=support_dreambooth,
            finetuning=support_finetuning,
            controlnet=support_controlnet,
            dropout=support_dropout,
        )
        if not self.support.kinds:
            raise ValueError("support at least one of DreamBooth, fine-tuning and ControlNet data sets")

    def sanitize_user_config(self, user_config: dict) -> dict:
        """The same configuration, checked.

        Raises:
            voluptuous.MultipleInvalid: with one `Invalid` per problem, each with its path.
        """
        problems = check(user_config, self.support)
        if problems:
            raise voluptuous.MultipleInvalid([_invalid(problem) for problem in problems])
        return user_config

    def sanitize_argparse_namespace(self, argparse_namespace: argparse.Namespace) -> argparse.Namespace:
        """A namespace of the same options, resolution and face range as pairs.

        Raises:
            voluptuous.Invalid: one of these two cannot be read.
        """
        values = dict(vars(argparse_namespace))
        try:
            values["resolution"] = config.parse_resolution(values.get("resolution"))
            values["face_crop_aug_range"] = config.parse_face_range(values.get("face_crop_aug_range"))
        except UserError as error:
            raise voluptuous.Invalid(str(error)) from error
        return argparse.Namespace(**values)


class BlueprintGenerator:
    """Resolves a configuration and options into parameters of data sets."""

    def __init__(self, sanitizer: ConfigSanitizer) -> None:
        self.sanitizer = sanitizer

    def generate(self, user_config: dict, argparse_namespace: argparse.Namespace, **runtime_params: Any) -> Blueprint:
        """
        Args:
            user_config: contents of a data-set file.
            argparse_namespace: options, the fallback of every value.
            runtime_params: values that are neither, such as `tokenizer`.

        Raises:
            voluptuous.Invalid: something is wrong in the configuration or the options.
        """
        user_config = self.sanitizer.sanitize_user_config(user_config)
        options = _options(self.sanitizer.sanitize_argparse_namespace(argparse_namespace))
        return blueprint_of(config.resolve(user_config, options, self.sanitizer.support), **runtime_params)

    @staticmethod
    def generate_params_by_fallbacks(param_klass: type[Params], fallbacks: Sequence[dict]) -> Params:
        """Parameters of a class, each from the first table that has it, by its key or by its option's name."""
        search = BlueprintGenerator.search_value
        values = {}
        for entry in dataclasses.fields(param_klass):  # type: ignore[arg-type]
            name = entry.name
            value = search(name, fallbacks, search(config.OPTION_NAMES.get(name, name), fallbacks))
            if value is not None:
                values[name] = value
        return param_klass(**values)

    @staticmethod
    def search_value(key: str, fallbacks: Sequence[dict], default_value: Any = None) -> Any:
        """The first value of a key that is there and not None."""
        return config.search(key, fallbacks, default_value)


def blueprint_of(settings: Sequence[DatasetSettings], **runtime_params: Any) -> Blueprint:
    """Resolved settings, one per data set, in the form of a blueprint.

    Args:
        runtime_params: values that are no settings, such as `tokenizer`.
    """
    datasets = [
        DatasetBlueprint(
            is_dreambooth=one.kind == "dreambooth",
            is_controlnet=one.kind == "controlnet",
            params=_dataset_params(one, runtime_params),
            subsets=[SubsetBlueprint(_subset_params(subset)) for subset in one.subsets],
        )
        for one in settings
    ]
    return Blueprint(DatasetGroupBlueprint(datasets))


def generate_dataset_group_by_blueprint(dataset_group_blueprint: DatasetGroupBlueprint) -> DatasetGroup:
    """The data sets of a blueprint, with buckets made; their report is logged.

    Raises:
        UserError: pictures that cannot be used.
    """
    datasets = [_make_dataset(blueprint) for blueprint in dataset_group_blueprint.datasets]
    if not datasets:
        raise UserError("the configuration has no datasets", "add at least one")
    seed = random.randint(0, 2**31)
    for dataset in datasets:
        dataset.make_buckets()
        dataset.set_seed(seed)
    for line in describe([dataset.core for dataset in datasets if dataset.core is not None]):
        log.info("%s", line)
    return DatasetGroup(datasets)


def generate_dreambooth_subsets_config_by_subdirs(
    train_data_dir: str | None = None, reg_data_dir: str | None = None
) -> list[dict]:
    """Subset tables of the `N_name` folders, training pictures first; a folder that does not exist gives none."""
    return subset_tables(train_data_dir) + subset_tables(reg_data_dir, is_reg=True)


def generate_controlnet_subsets_config_by_subdirs(
    train_data_dir: str | None = None, conditioning_data_dir: str | None = None, caption_extension: str = ".txt"
) -> list[dict]:
    """The subset table of a folder of pictures and one of conditioning pictures; empty if there is no such folder."""
    if not train_data_dir or not os.path.isdir(train_data_dir):
        return []
    return [
        {
            "image_dir": train_data_dir,
            "conditioning_data_dir": conditioning_data_dir,
            "caption_extension": caption_extension,
            "num_repeats": 1,
        }
    ]


def load_user_config(file: str | os.PathLike[str]) -> dict:
    """Contents of a TOML or JSON data-set file.

    Raises:
        UserError: it cannot be read.
    """
    return config_file.read(file)


def _invalid(problem: Problem) -> voluptuous.Invalid:
    return voluptuous.Invalid(problem.text, path=list(problem.path))


def _options(namespace: argparse.Namespace) -> dict[str, Any]:
    """Option values by key; the options that the namespace lacks count as not given."""
    given = vars(namespace)
    names = {entry.name for entry in dataclasses.fields(DatasetConfig)} | {"max_token_length", *config.OPTION_NAMES}
    values = {name: given.get(config.OPTION_NAMES.get(name, name)) for name in names}
    values["caption_extension"] = given.get("caption_extention") or given.get("caption_extension")
    return values


def _dataset_params(settings: DatasetSettings, runtime_params: Mapping[str, Any]) -> BaseDatasetParams:
    return _filled(PARAMS[settings.kind][0], settings, runtime_params)


def _subset_params(settings: SubsetSettings) -> BaseSubsetParams:
    return _filled(PARAMS[settings.kind][1], settings, {})


def _filled(params: type[Params], settings: Any, extra: Mapping[str, Any]) -> Params:
    names = [entry.name for entry in dataclasses.fields(params)]  # type: ignore[arg-type]
    values = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    return params(**values, **{name: value for name, value in extra.items() if name in names})


def _make_dataset(blueprint: DatasetBlueprint) -> BaseDataset:
    kind = DreamBoothDataset if blueprint.is_dreambooth else FineTuningDataset
    kind = ControlNetDataset if blueprint.is_controlnet else kind
    subsets = [kind.subset_class(**_shallow(subset.params)) for subset in blueprint.subsets]
    return kind(subsets=subsets, **_shallow(blueprint.params))


def _shallow(params: Any) -> dict[str, Any]:
    # `dataclasses.asdict` would copy the tokenizer.
    return {entry.name: getattr(params, entry.name) for entry in dataclasses.fields(params)}
