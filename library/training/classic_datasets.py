"""Data sets of the three kinds with sd-scripts' constructors; see `classic_base.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from library.data.buckets import Size
from library.data.records import DatasetSettings
from library.data.sources import scan
from library.training.classic_base import BaseDataset
from library.training.classic_subsets import BaseSubset, ControlNetSubset, DreamBoothSubset, FineTuningSubset


class _OfSubsets(BaseDataset):
    """Pictures of subsets of one kind.

    Args:
        resolution: (width, height).

    Raises:
        UserError: no resolution, or pictures that cannot be used.
    """

    subset_class: type[BaseSubset]

    def __init__(
        self,
        subsets: Sequence[Any],
        batch_size: int,
        tokenizer: Any = None,
        max_token_length: int | None = None,
        resolution: Size | None = None,
        enable_bucket: bool = False,
        min_bucket_reso: int = 256,
        max_bucket_reso: int = 1024,
        bucket_reso_steps: int = 64,
        bucket_no_upscale: bool = False,
        debug_dataset: bool = False,
        *,
        network_multiplier: float = 1.0,
    ) -> None:
        super().__init__(tokenizer, max_token_length, resolution, debug_dataset, network_multiplier=network_multiplier)
        self.batch_size = batch_size
        self.set_buckets(enable_bucket, min_bucket_reso, max_bucket_reso, bucket_reso_steps, bucket_no_upscale)
        settings = DatasetSettings(
            kind=self.kind,
            batch_size=batch_size,
            resolution=resolution,
            enable_bucket=enable_bucket,
            bucket_no_upscale=bucket_no_upscale,
            subsets=tuple(subset.settings() for subset in subsets),
        )
        self.register_scan(subsets, scan(settings))


class DreamBoothDataset(_OfSubsets):
    """Folders of pictures with caption files."""

    stands_for = ("dreambooth",)
    subset_class = DreamBoothSubset

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
        super().__init__(
            subsets,
            batch_size,
            tokenizer,
            max_token_length,
            resolution,
            enable_bucket,
            min_bucket_reso,
            max_bucket_reso,
            bucket_reso_steps,
            bucket_no_upscale,
            debug_dataset,
            network_multiplier=network_multiplier,
        )
        self.prior_loss_weight = prior_loss_weight


class FineTuningDataset(_OfSubsets):
    """Pictures that metadata files name, a `FineTuningSubset` each; they may say the training sizes themselves."""

    stands_for = ("finetuning",)
    kind = "finetuning"
    subset_class = FineTuningSubset


class ControlNetDataset(_OfSubsets):
    """Folders of pictures with conditioning pictures, a `ControlNetSubset` each."""

    stands_for = ("controlnet",)
    kind = "controlnet"
    subset_class = ControlNetSubset
