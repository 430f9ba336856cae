"""What the data rooms exchange: resolved settings of data sets and subsets, and one record a picture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from library.data.buckets import Size

# Settings of a subset that change its pictures, or its captions, from one use to the next so that no cache can follow.
CHANGING_PICTURES = ("color_aug", "random_crop")
CHANGING_CAPTIONS = ("caption_dropout_rate", "shuffle_caption", "token_warmup_step", "caption_tag_dropout_rate")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubsetSettings:
    """One folder of pictures with its caption and augmentation settings; field names are config keys.

    Attributes:
        kind: `dreambooth`, `finetuning` or `controlnet`.
        image_dir: folder of the pictures, as the user wrote it; a picture's key starts with it.
        num_repeats: how often each picture stands in an epoch.
        is_reg: regularisation pictures, weighted by `prior_loss_weight`.
        class_tokens: caption of pictures without a caption file.
        face_crop_aug_range: (smallest, largest) share of the shorter side that a face takes.
        token_warmup_step: step at which all caption parts are used; below 1 a share of all steps.
        resize_interpolation: how pictures are resized; None: the data set's way, else area.
        ignore_exif_orientation: pictures are used as stored, even where their EXIF data say to turn them.
        custom_attributes: handed on in the batch untouched.
    """

    kind: str = "dreambooth"
    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    caption_separator: str = ","
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    color_aug: bool = False
    flip_aug: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    random_crop: bool = False
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    alpha_mask: bool = False
    resize_interpolation: str | None = None
    ignore_exif_orientation: bool = False
    cache_info: bool = False
    custom_attributes: dict[str, Any] | None = None

    @property
    def source(self) -> str:
        """What names the subset in messages: its metadata file, else its folder."""
        return self.metadata_file or self.image_dir or "a subset"

    def changing(self, names: Sequence[str]) -> str | None:
        """The first of these settings that is on."""
        return next((name for name in names if getattr(self, name)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSettings:
    """One data set: subsets that share batch size, resolution and buckets.

    Attributes:
        resolution: (width, height) of training pictures; None only before it is checked.
        batch_size: pictures a batch on each process.
        network_multiplier: multiplier of the trained network for this data set's pictures.
        skip_image_resolution: pictures of at most this area (width times height) are left out.
        prior_loss_weight: loss weight of regularisation pictures.
        max_token_length: 150 or 225 for long captions, else None.
        is_validation: the pictures are never trained on, they are for the validation loss.
    """

    kind: str = "dreambooth"
    batch_size: int = 1
    resolution: Size | None = None
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    resize_interpolation: str | None = None
    network_multiplier: float = 1.0
    skip_image_resolution: Size | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None
    prior_loss_weight: float = 1.0
    max_token_length: int | None = None
    debug_dataset: bool = False
    is_validation: bool = False
    subsets: tuple[SubsetSettings, ...] = ()


def changed_settings(settings: SubsetSettings | DatasetSettings, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    return {
        field.name: value
        for field in fields(settings)
        if field.name not in leave_out and (value := getattr(settings, field.name)) != field.default
    }


@dataclass(slots=True)
class Item:
    """One picture of a data set.

    Attributes:
        key: identity in the data set and in messages; for folders the path `image_dir/name`.
        path: file of the picture.
        caption: as read from its source, unprocessed.
        size: (width, height) of the picture, turned as `orientation` says.
        repeats: how often it stands in an epoch.
        is_reg: regularisation picture.
        subset: index into `DatasetSettings.subsets`.
        bucket: training size, set by the bucket maker.
        resized: size before the crop, set by the bucket maker.
        latents_npz: latent cache file, set by the cache.
        text_npz: text output cache file, set by the cache.
        text_variants: caption -> such a file, where the picture has several captions.
        orientation: how the stored pixels are turned, see `library.data.orientation`; 1: not at all.
        train_size: bucket that its metadata ask for.
        conditioning: picture beside it: what a ControlNet is shown, or else a mask of the loss.
        conditioning_orientation: as `orientation`, of that picture.
    """

    key: str
    path: str
    caption: str
    size: Size
    repeats: int = 1
    is_reg: bool = False
    subset: int = 0
    bucket: Size | None = None
    resized: Size | None = None
    latents_npz: str | None = None
    text_npz: str | None = None
    text_variants: dict[str, str] | None = None
    orientation: int = 1
    train_size: Size | None = None
    conditioning: str | None = None
    conditioning_orientation: int = 1


@dataclass(slots=True)
class Found:
    """What one subset's folder or metadata file gave.

    Attributes:
        items: one for each picture.
        notes: what the user should know.
        broken: files that cannot be used, with the reason.
        tag_texts: captions or tags that tag counts are made of.
    """

    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    tag_texts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ScanResult:
    """What a data set's folders or metadata files hold.

    Attributes:
        items: training pictures subset by subset, then regularisation pictures.
        validation: held-out pictures, each once; empty without a split.
        notes: what the user should know, a line each.
        tag_frequency: base name of the folder or metadata file -> tag -> count, for metadata.
        num_train_images: training pictures, repeats counted.
        num_reg_images: regularisation pictures found, repeats of their folders counted.
        image_counts: per subset of the settings the pictures found, repeats not counted; 0: subset ignored.
        broken: files that were left out because they cannot be read, each with the reason.
        bucket_sizes: the buckets, where the metadata of all pictures say them.
    """

    items: list[Item] = field(default_factory=list)
    validation: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tag_frequency: dict[str, dict[str, int]] = field(default_factory=dict)
    num_train_images: int = 0
    num_reg_images: int = 0
    image_counts: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    bucket_sizes: list[Size] | None = None
