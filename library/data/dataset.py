"""Data sets: planned batches become pictures or cached latents, captions, token ids and the numbers beside them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from library.data import captions, images
from library.data.buckets import BucketRule, Fit, Size, bucket_rule, covering, sort_into_buckets
from library.data.latents_file import CachedLatents, read_latents
from library.data.pairs import uses_masks
from library.data.plan import EpochPlan, PlannedBatch, make_plan
from library.data.records import CHANGING_CAPTIONS, CHANGING_PICTURES, DatasetSettings, Item, ScanResult, SubsetSettings
from library.data.sample import Sample, fits_without_buckets, sample_of_cache, sample_of_picture
from library.data.text_file import CachedText, read_text
from library.messages import UserError, log, some
from library.runtime.streams import python_stream

if TYPE_CHECKING:
    from library.data.batch import Batch

Tokenize = Callable[[str], tuple[torch.Tensor, torch.Tensor | None]]


class Dataset(torch.utils.data.Dataset):
    """The pictures of one `DatasetSettings`, sorted into buckets.

    `batch` is a function of its arguments and the run's seed alone. As a torch data set, item i is the whole
    batch i of the current epoch (`current_epoch`, `current_step`), for callers that bring their own loader.

    Attributes:
        settings: resolved settings.
        bucket_sizes: the buckets where metadata say them, else None.
        items: the pictures that are used, each with bucket and resized size.
        buckets: their distribution.
        index: place of this data set in its group.
        num_train_images, num_reg_images, tag_frequency, image_counts: see `ScanResult`.
        replacements: (from, to) pairs applied to captions in this order; see `add_replacement`.
        memory_latents: latents kept in memory, by item, filled by `library.data.cache`.
        memory_text: text outputs in memory by caption, filled by `library.data.text_cache`.
    """

    def __init__(self, settings: DatasetSettings, scan: ScanResult, *, tokenize: Tokenize | None, seed: int) -> None:
        """
        Args:
            settings: with a resolution.
            scan: what the data set's folders hold; its items get their bucket here.
            tokenize: caption -> (int64 (n, 77), the same of a second tokenizer or None); None: no token ids. It must
                be picklable where loader workers are started by spawning (Windows, macOS).
            seed: the run's seed.

        Raises:
            UserError: settings that no batch can be made from.
        """
        if scan.bucket_sizes is not None:
            settings = replace(settings, enable_bucket=True)
        elif settings.resolution is None:
            raise UserError("no training resolution is given", "set --resolution, or resolution in the data-set file")
        self.settings = settings
        self.bucket_sizes = scan.bucket_sizes
        self.tokenize = tokenize
        self.seed = seed
        self.index = 0
        self.tag_frequency = scan.tag_frequency
        self.num_train_images = scan.num_train_images
        self.num_reg_images = scan.num_reg_images
        self.image_counts = list(scan.image_counts)
        self.replacements: list[tuple[str, str | list[str]]] = []
        self.memory_latents: list[CachedLatents | None] | None = None
        self.memory_text: dict[str, CachedText] | None = None
        self.max_train_steps = 0
        self.current_epoch = 0
        self.current_step = 0
        self._plan: EpochPlan | None = None
        self._sizes_checked = settings.enable_bucket
        self.items, fits = _assign(scan.items, self._rule())
        self.buckets = sort_into_buckets(fits, (item.repeats for item in self.items))

    def _rule(self) -> BucketRule:
        settings = self.settings
        if self.bucket_sizes is not None:
            return BucketRule(self.bucket_sizes)
        assert settings.resolution is not None
        return bucket_rule(
            settings.resolution,
            enable=settings.enable_bucket,
            smallest=settings.min_bucket_reso,
            largest=settings.max_bucket_reso,
            step=settings.bucket_reso_steps,
            no_upscale=settings.bucket_no_upscale,
        )

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    @property
    def plan_batch_size(self) -> int:
        """Entries of a bucket that make one batch."""
        return self.settings.batch_size

    @property
    def subsets(self) -> tuple[SubsetSettings, ...]:
        return self.settings.subsets

    @property
    def resolution(self) -> Size | None:
        return self.settings.resolution

    @property
    def enable_bucket(self) -> bool:
        return self.settings.enable_bucket

    @property
    def bucket_info(self) -> dict | None:
        """Buckets and mean aspect error for model metadata; None without bucketing."""
        return self.buckets.info() if self.settings.enable_bucket else None

    @property
    def bucket_limits(self) -> tuple[int | None, int | None]:
        """Smallest and largest bucket side as they are recorded; None where they do not count."""
        if not self.settings.enable_bucket or self.bucket_sizes is not None:
            return None, None
        return self.settings.min_bucket_reso, self.settings.max_bucket_reso

    @property
    def image_data(self) -> dict[str, Item]:
        return {item.key: item for item in self.items}

    def batch(self, planned: PlannedBatch, *, epoch: int, step: int) -> Batch:
        """Make one planned batch.

        Args:
            planned: which items; of this data set.
            epoch: 1-based; names the random draws.
            step: global step at which the batch is used, for token warm-up.

        Raises:
            UserError: a picture or cache file cannot be used; it names the file.
        """
        self._check_sizes()
        if self.settings.is_validation:  # the same draws, where there are any, every time
            epoch = 0
        samples, texts, encoded, flips, items = [], [], [], [], []
        for index, occurrence in zip(planned.items, planned.occurrences, strict=True):
            item = self.items[index]
            subset = self.subsets[item.subset]
            place = f"{self.index}:{index}:{occurrence}"
            draw = python_stream(self.seed, "augmentation", epoch, place)
            flipped = subset.flip_aug and draw.random() < 0.5
            try:
                samples.append(self._sample(index, item, subset, draw, flipped))
                text, outputs = self._text(item, subset, epoch, step, place)
                texts.append(text)
                encoded.append(outputs)
            except UserError:
                raise
            except Exception as error:
                raise RuntimeError(f"preparing {item.key} failed: {error}") from error
            flips.append(flipped)
            items.append(item)
        return self._collate(samples, texts, encoded, flips, items)

    def _check_sizes(self) -> None:
        """Without buckets, refuse all pictures of a wrong size at the first batch instead of one by one later."""
        if self._sizes_checked:
            return
        assert self.resolution is not None
        wrong = [
            item
            for index, item in enumerate(self.items)
            if self._cached_nowhere(index)
            and not fits_without_buckets(item, self.subsets[item.subset], self.resolution)
        ]
        if wrong:
            raise UserError(
                f"without buckets every picture must be {self.resolution[0]}x{self.resolution[1]}: "
                f"{some(_with_sizes(wrong))}",
                "use --enable_bucket, or resize the pictures",
            )
        self._sizes_checked = True

    def _cached_nowhere(self, index: int) -> bool:
        in_memory = self.memory_latents is not None and self.memory_latents[index] is not None
        return not in_memory and self.items[index].latents_npz is None

    def _caption(self, item: Item, subset: SubsetSettings, epoch: int, step: int, place: str) -> str:
        return captions.process(
            item.caption,
            subset,
            python_stream(self.seed, "caption", epoch, place),
            epoch=epoch,
            step=step,
            max_train_steps=self.max_train_steps,
            replacements=self._replacements(item),
        )

    def fixed_caption(self, item: Item) -> str:
        """The item's caption where nothing changes it by chance."""
        return captions.fixed(item.caption, self.subsets[item.subset], self._replacements(item))

    def caption_variants(self, item: Item) -> list[str]:
        """All captions that the item can have where only wildcards change it: what a text cache encodes.

        Empty if there are too many (`library.data.captions.MOST_VARIANTS`).
        """
        return captions.variants(item.caption, self.subsets[item.subset], self._replacements(item))

    def _text(
        self, item: Item, subset: SubsetSettings, epoch: int, step: int, place: str
    ) -> tuple[str, CachedText | None]:
        """This time's caption, and its cached outputs if there are any."""
        if self.memory_text is None and item.text_npz is None:
            return self._caption(item, subset, epoch, step, place), None
        draw = python_stream(self.seed, "caption", epoch, place) if subset.enable_wildcard else None
        text = captions.fixed(item.caption, subset, self._replacements(item), draw)
        if self.memory_text is not None:
            return text, self.memory_text[text]
        assert item.text_npz is not None
        return text, read_text(item.text_variants[text] if item.text_variants else item.text_npz)

    def _replacements(self, item: Item) -> list[tuple[str, str | list[str]]]:
        """Regularisation pictures show the class, not what is learned: their captions stay."""
        return [] if item.is_reg else self.replacements

    def _sample(self, index: int, item: Item, subset: SubsetSettings, draw: random.Random, flipped: bool) -> Sample:
        cached = self._cached(index, item)
        if cached is not None:
            return sample_of_cache(cached, item, subset, self.settings, flipped)
        return sample_of_picture(item, subset, self.settings, draw, flipped)

    def _cached(self, index: int, item: Item) -> CachedLatents | None:
        if self.memory_latents is not None and self.memory_latents[index] is not None:
            return self.memory_latents[index]
        if item.latents_npz is None:
            return None
        return read_latents(item.latents_npz)

    def _collate(
        self,
        samples: Sequence[Sample],
        texts: list[str],
        encoded: Sequence[CachedText | None],
        flips: list[bool],
        items: Sequence[Item],
    ) -> Batch:
        prior = self.settings.prior_loss_weight
        tops = [images.crop_top_left(s.ltrb, s.target, f) for s, f in zip(samples, flips, strict=True)]
        outputs = [entry.tensors() for entry in encoded if entry is not None]
        hidden1, hidden2, pooled = (_stack(column) for column in zip(*outputs, strict=True)) if outputs else [None] * 3
        ids, ids2 = (None, None) if outputs else self._token_ids(texts)
        attributes = [dict(self.subsets[item.subset].custom_attributes or {}) for item in items]
        batch: Batch = {
            "loss_weights": torch.tensor([prior if item.is_reg else 1.0 for item in items], dtype=torch.float32),
            "input_ids": ids,
            "input_ids2": ids2,
            "text_encoder_outputs1_list": hidden1,
            "text_encoder_outputs2_list": hidden2,
            "text_encoder_pool2_list": pooled,
            "images": _stack([s.image for s in samples]),
            "latents": _stack([s.latents for s in samples]),
            "captions": texts,
            "original_sizes_hw": torch.tensor([s.original[::-1] for s in samples], dtype=torch.int64),
            "crop_top_lefts": torch.tensor(tops, dtype=torch.int64),
            "target_sizes_hw": torch.tensor([s.target[::-1] for s in samples], dtype=torch.int64),
            "flippeds": flips,
            "image_keys": [item.key for item in items],
            "alpha_masks": self._masks(samples),
            "network_multipliers": torch.full((len(items),), float(self.settings.network_multiplier)),
            "custom_attributes": attributes,
        }
        if self.settings.kind == "controlnet":
            batch["conditioning_images"] = _stack([s.conditioning for s in samples])
        return batch

    def _token_ids(self, texts: Sequence[str]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.tokenize is None:
            return None, None
        first, second = zip(*(self.tokenize(text) for text in texts), strict=True)
        return torch.stack(first), (None if second[0] is None else torch.stack(second))

    def _masks(self, samples: Sequence[Sample]) -> torch.Tensor | None:
        if not any(uses_masks(subset, self.settings.kind) for subset in self.subsets):
            return None
        blanks = (torch.ones(s.target[1], s.target[0]) if s.mask is None else s.mask for s in samples)
        return torch.stack(list(blanks))

    def __len__(self) -> int:
        """Batches of an epoch on one process."""
        return self.buckets.batch_count(self.batch_size)

    def __getitem__(self, position: int) -> Batch:
        epoch = max(self.current_epoch, 1)
        if self._plan is None or self._plan.epoch != epoch:
            self._plan = make_plan([self], seed=self.seed, epoch=epoch)
        return self.batch(self._plan.batches[0][position], epoch=epoch, step=self.current_step)

    def set_current_epoch(self, epoch: int) -> None:
        self.current_epoch = epoch

    def set_current_step(self, step: int) -> None:
        self.current_step = step

    def set_max_train_steps(self, steps: int) -> None:
        """Tell the number of steps, of which a fractional token warm-up is a share."""
        self.max_train_steps = steps

    def add_replacement(self, str_from: str, str_to: str | list[str]) -> None:
        """Replace text in every caption but those of regularisation pictures.

        From "" the whole caption is replaced, by one of a list or by a text.
        """
        self.replacements.append((str_from, str_to))

    def is_latent_cacheable(self) -> bool:
        """No subset changes pictures in a way that fixed latents cannot follow."""
        return not any(subset.changing(CHANGING_PICTURES) for subset in self.subsets)

    def is_text_encoder_output_cacheable(self) -> bool:
        """No subset changes captions in more than a few ways."""
        changing = any(subset.changing(CHANGING_CAPTIONS) for subset in self.subsets)
        drawn = [item for item in self.items if self.subsets[item.subset].enable_wildcard]
        return not changing and all(self.caption_variants(item) for item in drawn)

    def verify_bucket_reso_steps(self, min_steps: int) -> None:
        """Refuse bucket steps that the model's U-Net cannot take."""
        settings = self.settings
        odd = [size for size in self.bucket_sizes or () if size[0] % min_steps or size[1] % min_steps]
        if odd:
            raise UserError(
                f"metadata say the training size {odd[0][0]}x{odd[0][1]}, this model needs multiples of {min_steps}",
                "make the metadata anew with --bucket_reso_steps 64",
            )
        if self.bucket_sizes is None and settings.enable_bucket and settings.bucket_reso_steps % min_steps:
            raise UserError(
                f"bucket_reso_steps is {settings.bucket_reso_steps}, but this model needs a multiple of {min_steps}",
                f"set bucket_reso_steps to {min_steps} or {2 * min_steps}",
            )


def _assign(items: Sequence[Item], rule: BucketRule) -> tuple[list[Item], list[Fit]]:
    """Give every item its bucket; leave out those too small for any, with one warning that names them."""
    kept, fits, small = [], [], []
    for item in items:
        fit = rule.fit(item.train_size or item.size) if min(item.size) > 0 else None
        if fit is not None and item.train_size is not None:
            fit = covering(fit.bucket, item.size)  # the metadata's size names the bucket, the picture covers it
        if fit is None:
            small.append(item)
            continue
        item.bucket, item.resized = fit.bucket, fit.resized
        kept.append(item)
        fits.append(fit)
    if small:
        log.warning("left out, smaller than bucket_reso_steps %d: %s", rule.step, some(_with_sizes(small)))
    return kept, fits


def _with_sizes(items: Sequence[Item]) -> list[str]:
    return [f"{item.path} ({item.size[0]}x{item.size[1]})" for item in items]


def _stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if present and len(present) != len(tensors):
        raise RuntimeError("a batch mixes cached and other entries")
    return torch.stack(present) if present else None
