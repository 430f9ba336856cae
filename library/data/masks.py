"""What a run says and shows of its loss masks: how many pictures have one, and how it lies on a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.dataset import Dataset
from library.data.images import has_alpha_channel
from library.data.listing import map_files
from library.data.pairs import uses_masks
from library.data.records import DatasetSettings, Item, ScanResult
from library.data.sample import picture_with_mask
from library.data.sheets import with_mask
from library.runtime.files import atomic_path

if TYPE_CHECKING:
    import numpy as np

FOLDER = "masks"


def has_mask(item: Item, settings: DatasetSettings) -> bool:
    """Whether a picture has a loss mask: a picture of its own, or its alpha channel."""
    subset = settings.subsets[item.subset]
    if not uses_masks(subset, settings.kind):
        return False
    return item.conditioning is not None or (subset.alpha_mask and has_alpha(item.path))


def has_alpha(path: str) -> bool:
    """Whether a picture file has transparency, from its header."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return has_alpha_channel(picture)
    except (OSError, SyntaxError, ValueError):
        return False


def count_masks(settings: Sequence[DatasetSettings], scans: Sequence[ScanResult]) -> tuple[int, int] | None:
    """(pictures with a mask, all pictures) of a run, repeats not counted; None where no subset uses masks."""
    if not any(uses_masks(subset, one.kind) for one in settings for subset in one.subsets):
        return None
    pairs = [(item, one) for one, scan in zip(settings, scans, strict=True) for item in (*scan.items, *scan.validation)]
    return sum(map_files(lambda pair: has_mask(*pair), pairs)), len(pairs)


def write_overlays(group: Any, folder: Path, name: str) -> list[Path]:
    """One picture per bucket with its mask laid over it: what does not count is dark and coloured.

    Args:
        group: the data sets of a run.
        folder: gets a folder `masks`.
        name: begins the names of the files.

    Returns:
        the files; none where no picture has a mask.
    """
    written = []
    for number, dataset in enumerate(group.datasets):
        for size, pixels in _examples(dataset) if isinstance(dataset, Dataset) else ():
            from PIL import Image

            suffix = f"-{number + 1}" if len(group.datasets) > 1 else ""
            path = folder / FOLDER / f"{name}-{size[0]}x{size[1]}{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial:
                Image.fromarray(pixels).save(partial, "PNG")
            written.append(path)
    return written


def _examples(dataset: Dataset) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """(bucket, its first picture with a mask, as it is shown) for each bucket that has one."""
    shown = set()
    for item in dataset.items:
        if item.bucket in shown or item.path.endswith(".npz") or not has_mask(item, dataset.settings):
            continue
        assert item.bucket is not None
        shown.add(item.bucket)
        pixels = picture_with_mask(item, dataset.subsets[item.subset], dataset.settings)
        yield item.bucket, with_mask(pixels[..., :3], pixels[..., 3] / 255)
