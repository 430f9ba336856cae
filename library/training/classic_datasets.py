"""Data-set classes with sd-scripts' constructors, for programs that import, subclass or build them themselves.

The program itself builds `library.data.dataset.Dataset` from resolved settings; a set made here holds one of those
(`core`) and does its work with it. `isinstance(x, DreamBoothDataset)` holds for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from library.data.buckets import Buckets, Size
from library.data.classic import ImageInfo, image_transforms, load_foreign_dataset
from library.data.dataset import Dataset
from library.data.plan import EpochPlan, PlannedBatch, make_plan
from library.data.records import DatasetSettings, Item, ScanResult, SubsetSettings
from library.data.sources import scan
from library.messages import UserError, log
from library.models.family import family
from library.models.tokenizers import input_ids
from library.training.caption_tokens import CaptionTokens
from library.training.text_outputs import TextCacher

LATER_SUBSET_NAMES = (
    "caption_separator",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "cache_info",
    "alpha_mask",
    "resize_interpolation",
    "custom_attributes",
)


class BaseSubset:
    """Settings of one folder; the attributes may be changed until the data set is made."""

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
        if image_dir is None:
            raise UserError("a subset has no image_dir", "name its folder of pictures")
        super().__init__(image_dir, *common, **named)
        self.is_reg = is_reg
        self.class_tokens = class_tokens
        self.caption_extension = caption_extension
        if self.caption_extension and not self.caption_extension.startswith("."):
            self.caption_extension = "." + self.caption_extension


class _StandsFor(type):
    """Makes data sets of the program itself instances of the class that stands for their kind."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        kinds = cls.__dict__.get("stands_for", ())
        return isinstance(instance, Dataset) and instance.settings.kind in kinds


class BaseDataset(torch.utils.data.Dataset, metaclass=_StandsFor):
    """A data set whose pictures are registered one by one; item i is a whole batch.

    A subclass registers pictures with `register_image`, then calls `make_buckets`. One that overrides `__getitem__`
    gives its own batches, and the plan takes them as they are.

    Attributes:
        image_data: key -> `ImageInfo`; `image_to_subset`: key -> subset.
        core: the data set that does the work, once `make_buckets` was called.
    """

    stands_for = ("dreambooth", "finetuning", "controlnet")

    def __init__(
        self,
        tokenizer: Any = None,
        max_token_length: int | None = None,
        resolution: Size | None = None,
        debug_dataset: bool = False,
        *,
        network_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokenizers = list(tokenizer) if isinstance(tokenizer, (list, tuple)) else [tokenizer] if tokenizer else []
        self.max_token_length = max_token_length
        self.width, self.height = (None, None) if resolution is None else resolution
        self.debug_dataset = debug_dataset
        self.network_multiplier = network_multiplier
        self.image_transforms = image_transforms
        self.subsets: list[Any] = []
        self.image_data: dict[str, ImageInfo] = {}
        self.image_to_subset: dict[str, Any] = {}
        self.tag_frequency: dict[str, dict[str, int]] = {}
        self.batch_size = 1
        self.num_train_images = 0
        self.num_reg_images = 0
        self.prior_loss_weight = 1.0
        self.enable_bucket = False
        self.min_bucket_reso: int | None = None
        self.max_bucket_reso: int | None = None
        self.bucket_reso_steps: int | None = None
        self.bucket_no_upscale = False
        self.bucket_info: dict | None = None
        self.seed = 0
        self.index = 0
        self.current_epoch = 0
        self.current_step = 0
        self.max_train_steps = 0
        self.replacements: dict[str, str | list[str]] = {}
        self.core: Dataset | None = None

    def register_image(self, info: ImageInfo, subset: Any) -> None:
        """Add a picture; its size is read when buckets are made, unless it has one."""
        self.image_data[info.image_key] = info
        self.image_to_subset[info.image_key] = subset

    def set_seed(self, seed: int) -> None:
        self.seed = seed
        if self.core is not None:
            self.core.seed = seed

    def get_image_size(self, image_path: str) -> Size:
        """(width, height) of a picture file."""
        from library.data.image_size import image_size

        return image_size(image_path)

    def make_buckets(self) -> None:
        """Sort the registered pictures into buckets."""
        assert self.width is not None and self.height is not None
        kept = [subset for subset in self.subsets if subset in self.image_to_subset.values()]
        core = Dataset(
            DatasetSettings(
                batch_size=self.batch_size,
                resolution=(self.width, self.height),
                enable_bucket=self.enable_bucket,
                min_bucket_reso=self.min_bucket_reso or 256,
                max_bucket_reso=self.max_bucket_reso or 1024,
                bucket_reso_steps=self.bucket_reso_steps or 64,
                bucket_no_upscale=self.bucket_no_upscale,
                prior_loss_weight=self.prior_loss_weight,
                network_multiplier=self.network_multiplier,
                max_token_length=self.max_token_length,
                subsets=tuple(subset.settings() for subset in kept),
            ),
            ScanResult(
                items=[self._item(info, kept) for info in self.image_data.values()],
                tag_frequency=self.tag_frequency,
                num_train_images=self.num_train_images,
                num_reg_images=self.num_reg_images,
                image_counts=[subset.img_count for subset in kept],
            ),
            tokenize=CaptionTokens(self.tokenizers, self.max_token_length) if self.tokenizers else None,
            seed=self.seed,
        )
        core.index, core.max_train_steps = self.index, self.max_train_steps
        core.replacements = list(self.replacements.items())
        for item in core.items:
            info = self.image_data[item.key]
            info.bucket_reso, info.resized_size = item.bucket, item.resized
        self.core, self.bucket_info = core, core.bucket_info

    def _item(self, info: ImageInfo, subsets: Sequence[Any]) -> Item:
        if info.image_size is None:
            info.image_size = self.get_image_size(info.absolute_path)
        return Item(
            key=info.image_key,
            path=info.absolute_path,
            caption=info.caption,
            size=info.image_size,
            repeats=info.num_repeats,
            is_reg=info.is_reg,
            subset=subsets.index(self.image_to_subset[info.image_key]),
            latents_npz=info.latents_npz,
        )

    def get_input_ids(self, caption: str, tokenizer: Any = None) -> torch.Tensor:
        """Token ids of a caption, int64 (n, 77)."""
        return input_ids(tokenizer or self.tokenizers[0], [caption], self.max_token_length)[0]

    @property
    def _gives_batches(self) -> bool:
        return type(self).__getitem__ is not BaseDataset.__getitem__

    @property
    def plan_batch_size(self) -> int:
        return 1 if self._gives_batches or self.core is None else self.core.plan_batch_size

    @property
    def buckets(self) -> Buckets:
        """What the epoch plan takes; a set that gives ready batches is one bucket of them."""
        # Read anew each time: such a set may be empty until it has cached its latents.
        if self._gives_batches:
            return Buckets([(0, 0)], [list(range(len(self)))])
        return self.core.buckets if self.core is not None else Buckets()

    def plan(self, seed: int, epoch: int, processes: int = 1) -> EpochPlan:
        """The plan of one epoch, where this set stands in for a group."""
        return make_plan([self], seed=seed, epoch=epoch, processes=processes)

    def batch(self, planned: PlannedBatch, *, epoch: int, step: int) -> Any:
        """Make one planned batch, see `library.data.dataset.Dataset.batch`."""
        if self._gives_batches:
            self.set_current_epoch(epoch)
            self.set_current_step(step)
            return self[planned.items[0]]
        assert self.core is not None
        self.core.index = self.index
        return self.core.batch(planned, epoch=epoch, step=step)

    def __len__(self) -> int:
        return 0 if self.core is None else len(self.core)

    def __getitem__(self, index: int) -> Any:
        if self.core is None:
            raise IndexError(index)
        return self.core[index]

    def set_current_epoch(self, epoch: int) -> None:
        self.current_epoch = epoch
        if self.core is not None:
            self.core.set_current_epoch(epoch)

    def set_current_step(self, step: int) -> None:
        self.current_step = step
        if self.core is not None:
            self.core.set_current_step(step)

    def set_max_train_steps(self, max_train_steps: int) -> None:
        self.max_train_steps = max_train_steps
        if self.core is not None:
            self.core.set_max_train_steps(max_train_steps)

    def add_replacement(self, str_from: str, str_to: str | list[str]) -> None:
        self.replacements[str_from] = str_to
        if self.core is not None:
            self.core.add_replacement(str_from, str_to)

    def is_latent_cacheable(self) -> bool:
        return not any(subset.color_aug or subset.random_crop for subset in self.subsets)

    def is_text_encoder_output_cacheable(self) -> bool:
        return self.core is not None and self.core.is_text_encoder_output_cacheable()

    def verify_bucket_reso_steps(self, min_steps: int) -> None:
        if self.core is not None:
            self.core.verify_bucket_reso_steps(min_steps)

    def cache_latents(
        self, vae: Any, vae_batch_size: int = 1, cache_to_disk: bool = False, is_main_process: bool = True
    ) -> None:
        """Cache the latents of all pictures with a diffusers VAE; every process calls it."""
        from library.data.cache import cache_with_vae

        if self.core is not None:
            cache_with_vae([self.core], vae, vae_batch_size, cache_to_disk)

    def cache_text_encoder_outputs(
        self,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[Any],
        device: Any,
        weight_dtype: torch.dtype,
        cache_to_disk: bool = False,
        is_main_process: bool = True,
    ) -> None:
        """Encode all captions once with SDXL's text encoders; every process calls it."""
        if self.core is not None:
            cache = TextCacher(family("sdxl"), self.max_token_length)
            cache([self.core], tokenizers, text_encoders, device, weight_dtype, cache_to_disk)


class DreamBoothDataset(BaseDataset):
    """Folders of pictures with caption files."""

    stands_for = ("dreambooth",)

    def __init__(
        self,
        subsets: Sequence[DreamBoothSubset],
        batch_size: int,
        tokenizer: Any = None,
        max_token_length: int | None = None,
        resolution: Size | None = None,
        enable_bucket: bool = False,
        min_bucket_reso: int = 256,
        max_bucket_reso: int = 1024,
        bucket_reso_steps: int = 64,
        bucket_no_upscale: bool = False,
        prior_loss_weight: float = 1.0,
        debug_dataset: bool = False,
        *,
        network_multiplier: float = 1.0,
    ) -> None:
        """
        Args:
            resolution: (width, height).

        Raises:
            UserError: no resolution, or pictures that cannot be read.
        """
        super().__init__(tokenizer, max_token_length, resolution, debug_dataset, network_multiplier=network_multiplier)
        self.batch_size = batch_size
        self.prior_loss_weight = prior_loss_weight
        self.enable_bucket = enable_bucket
        if enable_bucket:
            self.min_bucket_reso, self.max_bucket_reso = min_bucket_reso, max_bucket_reso
            self.bucket_reso_steps, self.bucket_no_upscale = bucket_reso_steps, bucket_no_upscale
        settings = tuple(subset.settings() for subset in subsets)
        found = scan(DatasetSettings(batch_size=batch_size, resolution=resolution, subsets=settings))
        for note in found.notes:
            log.info("%s", note)
        for subset, count in zip(subsets, found.image_counts, strict=True):
            subset.img_count = count
        self.subsets = [subset for subset in subsets if subset.img_count]
        self.tag_frequency = found.tag_frequency
        self.num_train_images, self.num_reg_images = found.num_train_images, found.num_reg_images
        for item in found.items:
            info = ImageInfo(item.key, item.repeats, item.caption, item.is_reg, item.path)
            info.image_size = item.size
            self.register_image(info, subsets[item.subset])


class MinimalDataset(BaseDataset):
    """Base of data sets that `--dataset_class` names; it stands in for the whole group.

    A subclass gives `__len__` and `__getitem__`, whose items are whole batches: a dict of at least `images`,
    `latents`, `captions`, `input_ids` and `loss_weights`. It may change the attributes set here.
    """

    stands_for = ()

    def __init__(
        self,
        tokenizer: Any = None,
        max_token_length: int | None = None,
        resolution: Size | None = None,
        debug_dataset: bool = False,
        *,
        network_multiplier: float = 1.0,
    ) -> None:
        super().__init__(tokenizer, max_token_length, resolution, debug_dataset, network_multiplier=network_multiplier)
        self.num_repeats = 1
        self.img_count = 1
        self.bucket_info = {}
        self.is_reg = False
        self.image_dir = "dummy"
        self.datasets = [self]
        self.subsets = [self]

    @property
    def _gives_batches(self) -> bool:
        return True

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define __len__")

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __getitem__")

    def verify_bucket_reso_steps(self, min_steps: int) -> None:
        """Its batches are what they are."""

    def is_latent_cacheable(self) -> bool:
        return False

    def is_text_encoder_output_cacheable(self) -> bool:
        return False

    def disable_token_padding(self) -> None:
        """A subclass that tokenizes may leave padding out."""

    def enable_XTI(self, *args: Any, **kwargs: Any) -> None:
        """A subclass that tokenizes may handle tokens per layer."""


def load_arbitrary_dataset(args: Any, tokenizer: Any = None) -> Any:
    """The data set that `--dataset_class` names.

    Args:
        args: a namespace with `dataset_class`, `max_token_length`, `resolution` and `debug_dataset`.
        tokenizer: one, or a list of two.
    """
    return load_foreign_dataset(
        args.dataset_class,
        tokenizer=tokenizer,
        max_token_length=getattr(args, "max_token_length", None),
        resolution=getattr(args, "resolution", None),
        debug_dataset=getattr(args, "debug_dataset", False),
    )
