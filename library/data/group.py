"""The data sets of a run as one: their batches one after the other, and what is told to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.data.dataset import Dataset, Tokenize
from library.data.plan import EpochPlan, PlannedBatch, make_plan
from library.data.records import DatasetSettings, ScanResult
from library.data.validation import validation_parts
from library.messages import UserError

if TYPE_CHECKING:
    from library.data.batch import Batch

# (data sets, tokenizers, text encoders, device, dtype, to disk): encodes their captions, see `DatasetGroup.cache_text`.
CacheText = Callable[[Sequence[Any], Sequence[Any], Sequence[Any], Any, torch.dtype, bool], Any]


class DatasetGroup(torch.utils.data.Dataset):
    """The data sets of a run. Item i is one batch: those of the first data set, then those of the next.

    Attributes:
        datasets: the members: `Dataset`s, or others with the same methods.
        num_train_images, num_reg_images: sums over the members.
        validation: the held-out pictures, each once, without augmentation and with the same captions every time; its
            plan of epoch 1 serves every time. None without any.
        cache_text: encodes captions with given text encoders; set by whoever knows the models.
    """

    def __init__(self, datasets: Sequence[Any], validation: DatasetGroup | None = None) -> None:
        self.datasets = list(datasets)
        self.validation = validation
        self.cache_text: CacheText | None = None
        for index, dataset in enumerate(self.datasets):
            dataset.index = index

    @property
    def with_validation(self) -> list[Any]:
        """The members, then those of the validation group."""
        return self.datasets + (self.validation.datasets if self.validation is not None else [])

    @property
    def num_train_images(self) -> int:
        return sum(dataset.num_train_images for dataset in self.datasets)

    @property
    def num_reg_images(self) -> int:
        return sum(dataset.num_reg_images for dataset in self.datasets)

    @property
    def image_data(self) -> dict[str, Any]:
        """Records of all pictures by key; equal keys of later data sets win."""
        return {key: record for dataset in self.datasets for key, record in dataset.image_data.items()}

    def batch(self, planned: PlannedBatch, *, epoch: int, step: int) -> Batch:
        """Make one planned batch, see `Dataset.batch`."""
        return self.datasets[planned.dataset].batch(planned, epoch=epoch, step=step)

    def plan(self, seed: int, epoch: int, processes: int = 1) -> EpochPlan:
        """The plan of one epoch, see `library.data.plan.make_plan`."""
        return make_plan(self.datasets, seed=seed, epoch=epoch, processes=processes)

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, position: int) -> Batch:
        for dataset in self.datasets:
            if position < len(dataset):
                return dataset[position]
            position -= len(dataset)
        raise IndexError(position)

    def __iter__(self) -> Any:
        raise UserError(
            "a data-set group was unpacked or iterated",
            "generate_dataset_group_by_blueprint returns one group here, not the (train, validation) pair of later "
            "versions; index the group for its batches",
        )

    def set_current_epoch(self, epoch: int) -> None:
        for dataset in self.datasets:
            dataset.set_current_epoch(epoch)

    def set_current_step(self, step: int) -> None:
        for dataset in self.datasets:
            dataset.set_current_step(step)

    def set_max_train_steps(self, steps: int) -> None:
        for dataset in self.datasets:
            dataset.set_max_train_steps(steps)

    def add_replacement(self, str_from: str, str_to: str | list[str]) -> None:
        for dataset in self.with_validation:
            dataset.add_replacement(str_from, str_to)

    def verify_bucket_reso_steps(self, min_steps: int) -> None:
        for dataset in self.with_validation:
            dataset.verify_bucket_reso_steps(min_steps)

    def cache_latents(
        self, vae: Any, vae_batch_size: int = 1, cache_to_disk: bool = False, is_main_process: bool = True
    ) -> None:
        """Cache the latents of all members with a diffusers VAE; every process calls it."""
        from library.data.cache import cache_with_vae

        cache_with_vae(self.with_validation, vae, vae_batch_size, cache_to_disk)
        for dataset in self.with_validation:
            if not isinstance(dataset, Dataset):
                dataset.cache_latents(vae, vae_batch_size, cache_to_disk, is_main_process)

    def cache_text_encoder_outputs(
        self,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[Any],
        device: Any,
        weight_dtype: torch.dtype,
        cache_to_disk: bool = False,
        is_main_process: bool = True,
    ) -> None:
        """Encode the captions of all members once; every process calls it."""
        if self.cache_text is None:
            raise RuntimeError("this group was made without a function that encodes text (cache_text)")
        self.cache_text(self.with_validation, tokenizers, text_encoders, device, weight_dtype, cache_to_disk)
        for dataset in self.with_validation:
            if not isinstance(dataset, Dataset):
                dataset.cache_text_encoder_outputs(
                    tokenizers, text_encoders, device, weight_dtype, cache_to_disk, is_main_process
                )

    def is_latent_cacheable(self) -> bool:
        return all(dataset.is_latent_cacheable() for dataset in self.datasets)

    def is_text_encoder_output_cacheable(self) -> bool:
        return all(dataset.is_text_encoder_output_cacheable() for dataset in self.datasets)


def build_group(
    settings: Sequence[DatasetSettings],
    scans: Sequence[ScanResult],
    *,
    tokenize: Tokenize | None,
    seed: int,
) -> DatasetGroup:
    """The group of a run, with its validation group.

    Args:
        settings: one per data set.
        scans: what each data set's folders hold.
        tokenize: see `Dataset`.
        seed: the run's seed.
    """
    pairs = [pair for pair in zip(settings, scans, strict=True) if not pair[0].is_validation]
    trained = [Dataset(one, scan, tokenize=tokenize, seed=seed) for one, scan in pairs]
    held_out = [Dataset(one, scan, tokenize=tokenize, seed=seed) for one, scan in validation_parts(settings, scans)]
    return DatasetGroup(trained, DatasetGroup(held_out) if held_out else None)
