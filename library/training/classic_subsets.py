"""Subset classes with sd-scripts' constructors; `settings()` gives the same as resolved settings."""

from __future__ import annotations

from typing import Any

from library.data.records import SubsetSettings
from library.messages import UserError

LATER_SUBSET_NAMES = (
    "caption_separator",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "cache_info",
    "alpha_mask",
    "resize_interpolation",
    "ignore_exif_orientation",
    "custom_attributes",
)


class BaseSubset:
    """Settings of one folder; the attributes may be changed until the data set is made."""

    kind = "dreambooth"

    def __init__(
        self,
        image_dir: str | None,
        num_repeats: int,
        shuffle_caption: bool,
        keep_tokens: int,
        color_aug: bool,
        flip_aug: bool,
        face_crop_aug_range: tuple[float, float] | None,
        random_crop: bool,
        caption_dropout_rate: float,
        caption_dropout_every_n_epochs: int,
        caption_tag_dropout_rate: float,
        caption_prefix: str | None,
        caption_suffix: str | None,
        token_warmup_min: int,
        token_warmup_step: float,
        **later: Any,
    ) -> None:
        """
        Args:
            later: settings of later versions by name (`caption_separator`, `enable_wildcard`, ...).
        """
        unknown = sorted(set(later) - set(LATER_SUBSET_NAMES))
        if unknown:
            raise TypeError(f"{type(self).__name__} got unknown arguments: {', '.join(unknown)}")
        self.image_dir = image_dir
        self.num_repeats = num_repeats
        self.shuffle_caption = shuffle_caption
        self.keep_tokens = keep_tokens
        self.color_aug = color_aug
        self.flip_aug = flip_aug
        self.face_crop_aug_range = face_crop_aug_range
        self.random_crop = random_crop
        self.caption_dropout_rate = caption_dropout_rate
        self.caption_dropout_every_n_epochs = caption_dropout_every_n_epochs
        self.caption_tag_dropout_rate = caption_tag_dropout_rate
        self.caption_prefix = caption_prefix
        self.caption_suffix = caption_suffix
        self.token_warmup_min = token_warmup_min
        self.token_warmup_step = token_warmup_step
        self.img_count = 0
        defaults = SubsetSettings()
        for name in LATER_SUBSET_NAMES:
            setattr(self, name, later.get(name, getattr(defaults, name)))

    def settings(self) -> SubsetSettings:
        """The same as resolved settings."""
        names = SubsetSettings.__dataclass_fields__
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        if values.get("face_crop_aug_range") is not None:
            values["face_crop_aug_range"] = tuple(values["face_crop_aug_range"])
        return SubsetSettings(**values)


class DreamBoothSubset(BaseSubset):
    """Settings of one folder of pictures with caption files."""

    def __init__(
        self,
        image_dir: str,
        is_reg: bool,
        class_tokens: str | None,
        caption_extension: str,
        *common: Any,
        **named: Any,
    ) -> None:
        """
        Args:
            common, named: the arguments of `BaseSubset` after `image_dir`.
        """
        _require(image_dir, "image_dir", "name its folder of pictures")
        super().__init__(image_dir, *common, **named)
        self.is_reg = is_reg
        self.class_tokens = class_tokens
        self.caption_extension = _with_dot(caption_extension)


class FineTuningSubset(BaseSubset):
    """Settings of one metadata file."""

    kind = "finetuning"

    def __init__(self, image_dir: str | None, metadata_file: str, *common: Any, **named: Any) -> None:
        """
        Args:
            image_dir: folder that names in the metadata are relative to, or None.
            common, named: the arguments of `BaseSubset` after `image_dir`.
        """
        _require(metadata_file, "metadata_file", "name its file")
        super().__init__(image_dir, *common, **named)
        self.metadata_file = metadata_file


class ControlNetSubset(BaseSubset):
    """Settings of one folder of pictures and one of conditioning pictures."""

    kind = "controlnet"

    def __init__(
        self, image_dir: str, conditioning_data_dir: str, caption_extension: str, *common: Any, **named: Any
    ) -> None:
        """
        Args:
            common, named: the arguments of `BaseSubset` after `image_dir`.
        """
        _require(image_dir, "image_dir", "name its folder of pictures")
        _require(conditioning_data_dir, "conditioning_data_dir", "name its folder of conditioning pictures")
        super().__init__(image_dir, *common, **named)
        self.conditioning_data_dir = conditioning_data_dir
        self.caption_extension = _with_dot(caption_extension)


def _require(value: str | None, name: str, remedy: str) -> None:
    if value is None:
        raise UserError(f"a subset has no {name}", remedy)


def _with_dot(extension: str) -> str:
    return extension if not extension or extension.startswith(".") else f".{extension}"
