"""Makes smaller copies of a folder's pictures: one of each picture for each of several largest areas."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from library.data.images import read_upright
from library.data.listing import picture_suffixes
from library.data.picture_check import file_and_reason
from library.messages import UserError, log, progress, some
from library.options.data_tools import PictureResizeConfig
from library.runtime.files import atomic_path, make_folder, no_folder

METHODS = {"area": cv2.INTER_AREA, "cubic": cv2.INTER_CUBIC, "lanczos4": cv2.INTER_LANCZOS4}
JPEG_QUALITY = 100
CACHE_SUFFIX = ".npz"


@dataclass(slots=True)
class Outcome:
    """What happened to the pictures.

    Attributes:
        read: pictures that could be read.
        resized, saved: results that are smaller, and results in the picture's own size.
        unreadable: files with the reason.
        too_small: results that are left out, sides are below `divisible_by`.
    """

    read: int = 0
    resized: int = 0
    saved: int = 0
    unreadable: list[str] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)


def resize_folder(config: PictureResizeConfig) -> Outcome:
    """Write smaller copies of all pictures of a folder, and copy its other files unchanged.

    Pictures are turned as their EXIF data say, which the copies do not have.

    Raises:
        UserError: options or folders that cannot be used, or no picture can be read.
    """
    areas = parse_areas(config.max_resolution)
    if config.divisible_by < 1:
        raise UserError(f"--divisible_by is {config.divisible_by}", "it must be 1 or more")
    source, target = Path(config.src_img_folder), Path(config.dst_img_folder)
    pictures, others = _contents(source)
    if target.exists() and os.path.samefile(source, target):
        raise UserError(f"{source} is both source and destination", "give another folder for the results")
    make_folder(target)
    _warn_of_equal_stems(pictures)
    outcome = Outcome()
    for name in progress(pictures, "pictures"):
        _resize_one(source / name, target, areas, config, outcome)
        if config.copy_associated_files:
            _copy_associated(source, name, others, target, [label for label, _ in areas])
    for name in others:
        _copy(source / name, target / name)
    _report(outcome, target)
    if pictures and not outcome.read:
        raise UserError(f"no picture in {source} can be read", "see the files named above")
    return outcome


def parse_areas(text: str) -> list[tuple[str, int]]:
    """`512x512, 384x256` -> [("512x512", 262144), ("384x256", 98304)].

    Raises:
        UserError: an item of another form.
    """
    areas = []
    for item in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"(\d+)x(\d+)", item)
        area = int(match[1]) * int(match[2]) if match else 0
        if area < 1:
            raise UserError(
                f"--max_resolution {text} cannot be read: {item or 'an empty item'}",
                "give WIDTHxHEIGHT with a small x, several separated by commas, such as 512x512,384x384",
            )
        areas.append((item, area))
    return areas


def fitted(image: np.ndarray, area: int, divisible_by: int, method: int) -> np.ndarray | None:
    """A picture of at most an area, its sides cut to multiples in the middle.

    Args:
        image: (H, W, 3).
        area: largest width x height.
        divisible_by: see above.
        method: OpenCV's number of the interpolation.

    Returns:
        the picture; None where a side would vanish.
    """
    height, width = image.shape[:2]
    if width * height > area:
        scale = math.sqrt(area / (width * height))
        width, height = int(width * scale), int(height * scale)
        if min(width, height) < 1:
            return None
        image = cv2.resize(image, (width, height), interpolation=method)
    new_width, new_height = width - width % divisible_by, height - height % divisible_by
    if min(new_width, new_height) < 1:
        return None
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image[top : top + new_height, left : left + new_width]


def _contents(source: Path) -> tuple[list[str], list[str]]:
    """Names of pictures and of other files; folders are left out."""
    if not source.is_dir():
        raise UserError(f"{source} {no_folder(source)}", "give the folder that holds the pictures")
    names = sorted(name for name in os.listdir(source) if not (source / name).is_dir())
    suffixes = picture_suffixes()
    pictures = [name for name in names if name.lower().endswith(suffixes)]
    return pictures, [name for name in names if name not in set(pictures)]


def _warn_of_equal_stems(pictures: Sequence[str]) -> None:
    by_stem = defaultdict(list)
    for name in pictures:
        by_stem[os.path.splitext(name)[0]].append(name)
    equal = [" and ".join(names) for names in by_stem.values() if len(names) > 1]
    if equal:
        log.warning("these pictures give results of the same name, the last one stays: %s", some(equal))


def _resize_one(
    path: Path, target: Path, areas: Sequence[tuple[str, int]], config: PictureResizeConfig, outcome: Outcome
) -> None:
    try:
        image = read_upright(path)
    except UserError as error:
        outcome.unreadable.append(file_and_reason(error))
        return
    outcome.read += 1
    for label, area in areas:
        result = fitted(image, area, config.divisible_by, METHODS[config.interpolation])
        if result is None:
            outcome.too_small.append(f"{path} at {label}")
            continue
        _save(result, target / f"{path.stem}+{label}{'.png' if config.save_as_png else '.jpg'}")
        if image.shape[0] * image.shape[1] > area:
            outcome.resized += 1
        else:
            outcome.saved += 1


def _save(image: np.ndarray, path: Path) -> None:
    options = {"format": "PNG"} if path.suffix == ".png" else {"format": "JPEG", "quality": JPEG_QUALITY}
    with atomic_path(path) as partial:
        Image.fromarray(np.ascontiguousarray(image)).save(partial, **options)


def _copy_associated(source: Path, picture: str, others: Sequence[str], target: Path, labels: Sequence[str]) -> None:
    """Copy the files `STEM.*` that are no pictures beside each result; not caches, which are of the picture itself."""
    stem = os.path.splitext(picture)[0]
    for name in others:
        own, suffix = os.path.splitext(name)
        if own == stem and suffix.lower() != CACHE_SUFFIX:
            for label in labels:
                _copy(source / name, target / f"{stem}+{label}{suffix}")


def _copy(source: Path, target: Path) -> None:
    try:
        with atomic_path(target) as partial:
            shutil.copyfile(source, partial)
    except OSError as error:  # a broken link, a file that may not be read
        log.warning("not copied: %s (%s)", source, error.strerror)


def _report(outcome: Outcome, target: Path) -> None:
    counts = f"{outcome.read} pictures, {outcome.resized} results made smaller, {outcome.saved} in their own size"
    log.info("%s: %s", target, counts)
    _warn("%d pictures cannot be read and are left out: %s", outcome.unreadable)
    _warn("%d results are left out, a side would be smaller than --divisible_by: %s", outcome.too_small)


def _warn(text: str, names: Sequence[str]) -> None:
    if names:
        log.warning(text, len(names), some(names))
