"""Buckets: training sizes of several aspect ratios, and which of them a picture goes to.

Sizes are (width, height). The formulas are those of sd-scripts 0.7.0, so caches and metadata agree with its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from library.messages import UserError, log

Size = tuple[int, int]


def size_text(size: Size | None) -> str:
    """`512x768`; `?` where there is none."""
    return f"{size[0]}x{size[1]}" if size else "?"


@dataclass(frozen=True, slots=True)
class Fit:
    """Where a picture of one size goes.

    Attributes:
        bucket: training size.
        resized: size after resizing, before the crop; covers the bucket.
        ratio_error: aspect ratio of the bucket minus that of the picture.
    """

    bucket: Size
    resized: Size
    ratio_error: float


def covering(bucket: Size, size: Size) -> Fit:
    """A picture of this size in a given bucket: one side matches, the other covers it."""
    width, height = size
    ratio, bucket_ratio = width / height, bucket[0] / bucket[1]
    scale = bucket[1] / height if ratio > bucket_ratio else bucket[0] / width
    return Fit(bucket, (int(width * scale + 0.5), int(height * scale + 0.5)), bucket_ratio - ratio)


def bucket_sizes(base: Size, smallest: int, largest: int, step: int) -> list[Size]:
    """All bucket sizes of about the base's area, ascending by width, then height.

    Args:
        base: training resolution.
        smallest: shortest width of the series, pixels; a height may be shorter.
        largest: longest side, pixels.
        step: sides are multiples of it.

    Raises:
        UserError: no size is possible, or `smallest` is less than `step`.
    """
    if step < 1:
        raise UserError(f"bucket_reso_steps is {step}", "give 64, or another multiple of 8")
    if smallest < step:
        raise UserError(
            f"min_bucket_reso {smallest} is smaller than bucket_reso_steps {step}", f"set it to {step} or more"
        )
    area = (base[0] // step) * (base[1] // step)
    square = int(math.sqrt(area)) * step
    sizes = {(square, square)}
    for width in range(smallest, largest + 1, step):
        if width // step > area:  # from here on no height is left
            break
        height = min(largest, (area // (width // step)) * step)
        sizes |= {(width, height), (height, width)}
    sizes = {size for size in sizes if min(size) > 0}
    if not sizes:
        raise UserError(
            f"resolution {base[0]}x{base[1]} is smaller than bucket_reso_steps {step}", "raise the resolution"
        )
    return sorted(sizes)


def rounded_limits(smallest: int, largest: int, step: int) -> Size:
    """Smallest side rounded down and largest side rounded up to multiples of the step, with a warning."""
    if step < 1:
        raise UserError(f"bucket_reso_steps is {step}", "give 64, or another multiple of 8")
    low, high = smallest // step * step, -(-largest // step) * step
    if low != smallest:
        log.warning("min_bucket_reso %d is no multiple of bucket_reso_steps %d: using %d", smallest, step, low)
    if high != largest:
        log.warning("max_bucket_reso %d is no multiple of bucket_reso_steps %d: using %d", largest, step, high)
    return low, high


class BucketRule:
    """Maps picture sizes to buckets: by a list of sizes, by the picture's own size, or all to one size."""

    def __init__(self, sizes: Sequence[Size] | None, *, base: Size = (0, 0), step: int = 64) -> None:
        """
        Args:
            sizes: the buckets to choose from; None: each picture's own size, reduced where it exceeds the base's
                area and cut to multiples of `step` (never enlarged).
            base: training resolution; its area is the limit when `sizes` is None.
            step: granularity when `sizes` is None.
        """
        self.sizes = list(sizes) if sizes is not None else None
        self.step = step
        self.max_area = base[0] * base[1]
        self._known = set(self.sizes or ())
        self._ratios = np.array([w / h for w, h in self.sizes or ()], dtype=np.float64)
        self.fit = lru_cache(maxsize=None)(self._fit)

    def __reduce__(self) -> tuple:
        return _rebuild_rule, (self.sizes, self.max_area, self.step)

    def _fit(self, size: Size) -> Fit | None:
        """Bucket and resized size of a picture; None if it is smaller than one step and may not be enlarged."""
        return self._fit_own(size) if self.sizes is None else self._fit_list(size)

    def _fit_list(self, size: Size) -> Fit:
        assert self.sizes is not None
        ratio = size[0] / size[1]
        return covering(size if size in self._known else self.sizes[int(np.abs(self._ratios - ratio).argmin())], size)

    def _fit_own(self, size: Size) -> Fit | None:
        width, height = size
        ratio = width / height
        resized = size
        if width * height > self.max_area:
            resized = self._reduce(ratio)
        bucket = (self._cut(resized[0]), self._cut(resized[1]))
        if min(bucket) < 1:
            return None
        return Fit(bucket, resized, bucket[0] / bucket[1] - ratio)

    def _reduce(self, ratio: float) -> Size:
        """Size of about the largest allowed area with one side a multiple of the step."""
        wanted_width = math.sqrt(self.max_area * ratio)
        wanted_height = self.max_area / wanted_width
        by_width = self._round(wanted_width)
        by_height = self._round(wanted_height)
        height_of_width = self._round(by_width / ratio)
        width_of_height = self._round(by_height * ratio)
        error_by_width = abs(by_width / height_of_width - ratio) if height_of_width else math.inf
        error_by_height = abs(width_of_height / by_height - ratio) if by_height else math.inf
        if error_by_width < error_by_height:
            return by_width, int(by_width / ratio + 0.5)
        return int(by_height * ratio + 0.5), by_height

    def _round(self, value: float) -> int:
        return self._cut(int(value + 0.5))

    def _cut(self, value: int) -> int:
        return value - value % self.step


def _rebuild_rule(sizes: list[Size] | None, max_area: int, step: int) -> BucketRule:
    return BucketRule(sizes, base=(max_area, 1), step=step)


def bucket_rule(
    base: Size, *, enable: bool, smallest: int = 256, largest: int = 1024, step: int = 64, no_upscale: bool = False
) -> BucketRule:
    """The rule that a data set's settings ask for, with their limits checked.

    Raises:
        UserError: the resolution lies outside the limits, or no bucket is possible.
    """
    if min(base) < 1:
        raise UserError(f"resolution {base[0]}x{base[1]} is not a picture size", "give positive numbers")
    if not enable:
        return BucketRule([base])
    smallest, largest = rounded_limits(smallest, largest, step)
    if min(base) < smallest:
        raise UserError(
            f"resolution {base[0]}x{base[1]} is below min_bucket_reso {smallest}",
            "lower min_bucket_reso or raise the resolution",
        )
    if max(base) > largest:
        raise UserError(
            f"resolution {base[0]}x{base[1]} is above max_bucket_reso {largest}",
            "raise max_bucket_reso or lower the resolution",
        )
    if no_upscale:
        log.info("bucket_no_upscale: min_bucket_reso and max_bucket_reso have no effect")
        return BucketRule(None, base=base, step=step)
    return BucketRule(bucket_sizes(base, smallest, largest, step))


def crop_ltrb(bucket: Size, original: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the picture fitted inside the bucket: what SDXL is told about the crop.

    It describes an inner fit and not the crop that is made: existing models and caches were made this way.
    """
    width, height = bucket
    ratio = original[0] / original[1]
    if width / height > ratio:
        inner_width, inner_height = height * ratio, height
    else:
        inner_width, inner_height = width, width / ratio
    # Floor division of floats, as the original: offsets are whole, right and bottom keep their fractions.
    left = (width - inner_width) // 2
    top = (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


@dataclass(frozen=True, slots=True)
class Buckets:
    """Pictures of one data set sorted into buckets.

    Attributes:
        sizes: the sizes in use, ascending.
        members: per size the item indices, each as often as it is repeated, in the order of the items.
        mean_ratio_error: mean of |ratio error| over the items without repeats (0 without items).
    """

    sizes: list[Size] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    mean_ratio_error: float = 0.0

    def batch_count(self, batch_size: int) -> int:
        """Batches in one epoch on one process; a bucket's last batch may be smaller."""
        return sum(-(-len(items) // batch_size) for items in self.members)

    def info(self) -> dict:
        """`bucket_info` of the model metadata."""
        buckets = {
            index: {"resolution": size, "count": len(items)}
            for index, (size, items) in enumerate(zip(self.sizes, self.members, strict=True))
        }
        return {"buckets": buckets, "mean_img_ar_error": self.mean_ratio_error}


def sort_into_buckets(fits: Iterable[Fit], repeats: Iterable[int]) -> Buckets:
    """Collect items by bucket; item i stands `repeats[i]` times."""
    members: dict[Size, list[int]] = {}
    errors = []
    for index, (fit, times) in enumerate(zip(fits, repeats, strict=True)):
        members.setdefault(fit.bucket, []).extend([index] * times)
        errors.append(abs(fit.ratio_error))
    sizes = sorted(size for size, items in members.items() if items)
    mean = float(np.mean(errors)) if errors else 0.0
    return Buckets(sizes, [members[size] for size in sizes], mean)
