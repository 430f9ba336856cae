"""The base of data sets that `--dataset_class` names, and how such a set is loaded."""

from __future__ import annotations

from typing import Any

from library.data.buckets import Size
from library.data.classic import load_foreign_dataset
from library.training.classic_base import BaseDataset


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
