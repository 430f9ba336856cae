"""The base of data-set classes with sd-scripts' constructors, for programs that subclass or build them themselves.

The program itself builds `library.data.dataset.Dataset` from resolved settings; a set made here holds one of those
(`core`) and does its work with it. `isinstance(x, DreamBoothDataset)` holds for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from library.data.buckets import Buckets, Size
from library.data.classic import ImageInfo, image_transforms
from library.data.dataset import Dataset
from library.data.plan import EpochPlan, PlannedBatch, make_plan
from library.data.records import DatasetSettings, Item, ScanResult
from library.messages import log
from library.models.family import family
from library.models.tokenizers import input_ids
from library.training.caption_tokens import CaptionTokens
from library.training.text_outputs import TextCacher


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
    kind = "dreambooth"
    validation = None

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
        self.bucket_sizes: list[Size] | None = None
        self._scanned: dict[str, Item] = {}
        self.seed = 0
        self.index = 0
        self.current_epoch = 0
        self.current_step = 0
        self.max_train_steps = 0
        self.replacements: dict[str, str | list[str]] = {}
        self.core: Dataset | None = None

    def register_scan(self, subsets: Sequence[Any], found: ScanResult) -> None:
        """Take the pictures that a scan of subsets found."""
        for note in found.notes:
            log.info("%s", note)
        for subset, count in zip(subsets, found.image_counts, strict=True):
            subset.img_count = count
        self.subsets = [subset for subset in subsets if subset.img_count]
        self.tag_frequency = found.tag_frequency
        self.bucket_sizes = found.bucket_sizes
        self.num_train_images, self.num_reg_images = found.num_train_images, found.num_reg_images
        for item in found.items:
            info = ImageInfo(item.key, item.repeats, item.caption, item.is_reg, item.path)
            info.image_size, info.latents_npz, info.cond_img_path = item.size, item.latents_npz, item.conditioning
            self._scanned[item.key] = item
            self.register_image(info, subsets[item.subset])

    def set_buckets(self, enable: bool, smallest: int, largest: int, steps: int, no_upscale: bool) -> None:
        """Bucket settings; without buckets only that is recorded."""
        self.enable_bucket = enable
        if enable:
            self.min_bucket_reso, self.max_bucket_reso = smallest, largest
            self.bucket_reso_steps, self.bucket_no_upscale = steps, no_upscale

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
        resolution = None if self.width is None or self.height is None else (self.width, self.height)
        kept = [subset for subset in self.subsets if subset in self.image_to_subset.values()]
        core = Dataset(
            DatasetSettings(
                kind=self.kind,
                batch_size=self.batch_size,
                resolution=resolution,
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
                bucket_sizes=self.bucket_sizes,
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
        self.enable_bucket = core.enable_bucket
        if core.bucket_sizes is not None:
            self.min_bucket_reso = self.max_bucket_reso = self.bucket_reso_steps = None

    def _item(self, info: ImageInfo, subsets: Sequence[Any]) -> Item:
        if info.image_size is None:
            info.image_size = self.get_image_size(info.absolute_path)
        given = {
            "path": info.absolute_path,
            "caption": info.caption,
            "size": info.image_size,
            "repeats": info.num_repeats,
            "is_reg": info.is_reg,
            "subset": subsets.index(self.image_to_subset[info.image_key]),
            "latents_npz": info.latents_npz,
            "conditioning": info.cond_img_path,
        }
        scanned = self._scanned.get(info.image_key)
        return Item(key=info.image_key, **given) if scanned is None else replace(scanned, **given)

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
