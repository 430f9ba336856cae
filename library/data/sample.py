"""One picture of a batch: read from its file and cut to size, or taken from the latent cache."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from library.data import images
from library.data.buckets import Size, crop_ltrb
from library.data.latents_file import CachedLatents
from library.data.records import DatasetSettings, Item, SubsetSettings
from library.messages import UserError

Ltrb = tuple[float, float, float, float]


@dataclass(slots=True)
class Sample:
    """One picture of a batch, ready to be stacked.

    Attributes:
        image: float32 (3, H, W) in [-1, 1], or None when latents are given.
        latents: (4, H/8, W/8), or None.
        mask: float32 (H, W) in [0, 1], or None when the picture has no mask.
        conditioning: float32 (3, H, W) in [-1, 1] that a ControlNet is shown, or None.
        original: (width, height) that is told as the original size.
        ltrb: crop numbers, None where no crop is told.
        target: (width, height) of the training picture.
    """

    image: torch.Tensor | None
    latents: torch.Tensor | None
    mask: torch.Tensor | None
    original: Size
    ltrb: Ltrb | None
    target: Size
    conditioning: torch.Tensor | None = None


def interpolation(settings: DatasetSettings, subset: SubsetSettings) -> str:
    """How this subset's pictures are resized: its own way, else the data set's, else area."""
    return subset.resize_interpolation or settings.resize_interpolation or "area"


def sample_of_picture(
    item: Item, subset: SubsetSettings, settings: DatasetSettings, draw: random.Random, flipped: bool
) -> Sample:
    """Read a picture, cut it, change its colours and mirror it as its subset asks.

    Raises:
        UserError: the file cannot be read, or its size does not fit.
    """
    assert item.bucket is not None
    image = _with_mask(item, subset, settings)
    if settings.enable_bucket:
        original = (image.shape[1], image.shape[0])
        image = _cut_to_bucket(image, item, interpolation(settings, subset), draw if subset.random_crop else None)
        ltrb = crop_ltrb(item.bucket, original)
    else:
        image = _cut_to_base(image, item, subset, settings, draw)
        original, ltrb = item.bucket, None
    if subset.color_aug:
        image = images.augment_color(image, draw)
    if flipped:
        image = image[:, ::-1]
    mask = images.alpha_mask(image) if image.shape[2] == 4 else None
    target = (image.shape[1], image.shape[0])
    conditioning = _conditioning(item, subset, settings, flipped) if settings.kind == "controlnet" else None
    return Sample(images.to_tensor(image[..., :3]), None, mask, original, ltrb, target, conditioning)


def _with_mask(item: Item, subset: SubsetSettings, settings: DatasetSettings) -> np.ndarray:
    """The picture, with its mask as fourth channel where it has one; a conditioning picture comes before alpha."""
    masked = item.conditioning is not None and settings.kind != "controlnet"
    alpha = subset.alpha_mask and not masked
    image = images.read_image(item.path, alpha=alpha, orientation=item.orientation)
    if not masked:
        return image
    return np.dstack([image, _mask_pixels(item, (image.shape[1], image.shape[0]))])


def _mask_pixels(item: Item, size: Size) -> np.ndarray:
    """First channel of the mask's picture in the size of the training picture, uint8 (H, W)."""
    assert item.conditioning is not None
    mask = images.read_image(item.conditioning, orientation=item.conditioning_orientation)
    return images.resize(np.ascontiguousarray(mask[..., 0]), size, "area")


def _conditioning(
    item: Item, subset: SubsetSettings, settings: DatasetSettings, flipped: bool, *, cached: bool = False
) -> torch.Tensor | None:
    """What a ControlNet is shown, cut and mirrored as the picture: float32 (3, H, W) in [-1, 1]."""
    if item.conditioning is None:
        return None
    assert item.bucket is not None and item.resized is not None
    image = images.read_image(item.conditioning, orientation=item.conditioning_orientation)
    # Latents are cached of the picture cut to its size even without buckets.
    if settings.enable_bucket or (cached and (image.shape[1], image.shape[0]) == item.size):
        method = interpolation(settings, subset)
        image = images.crop_to_bucket(image, item.bucket, item.resized, interpolation=method)[0]
    else:
        image = images.resize(image, item.bucket, "lanczos")
    return images.to_tensor(image[:, ::-1] if flipped else image)


def picture_for_cache(item: Item, subset: SubsetSettings, settings: DatasetSettings) -> np.ndarray:
    """The picture whose latents are cached: cut to its bucket in the middle, without any random change.

    Returns:
        uint8 (H, W, 3), or 4 channels where the subset uses alpha masks.
    """
    image = images.read_image(item.path, alpha=subset.alpha_mask, orientation=item.orientation)
    return _cut_to_bucket(image, item, interpolation(settings, subset), None)


def picture_with_mask(item: Item, subset: SubsetSettings, settings: DatasetSettings) -> np.ndarray:
    """The picture and, as fourth channel, its mask, both cut as for training without any random change.

    Returns:
        uint8 (H, W, 4); 3 channels where the picture has no mask.
    """
    return _cut_to_bucket(_with_mask(item, subset, settings), item, interpolation(settings, subset), None)


def sample_of_cache(
    cached: CachedLatents, item: Item, subset: SubsetSettings, settings: DatasetSettings, flipped: bool
) -> Sample:
    """The cached latents of a picture or of its mirror image.

    Raises:
        UserError: they are not those of this training size, or the mirrored ones are missing.
    """
    assert item.bucket is not None
    latents = cached.flipped if flipped else cached.latents
    if latents is None:
        raise UserError(
            f"the latent cache of {item.key} has no flipped latents", "delete the cache file; it is made again"
        )
    target = (latents.shape[-1] * 8, latents.shape[-2] * 8)
    if target != (item.bucket[0] // 8 * 8, item.bucket[1] // 8 * 8):
        raise UserError(
            f"the latent cache of {item.key} is for {target[0]}x{target[1]}, not {item.bucket[0]}x{item.bucket[1]}",
            "start without --skip_cache_check, or delete the cache file",
        )
    mask, conditioning = cached.mask if subset.alpha_mask else None, None
    if settings.kind == "controlnet":
        conditioning = _conditioning(item, subset, settings, flipped, cached=True)
    elif item.conditioning is not None:
        mask = _cut_mask(item, interpolation(settings, subset))
    if mask is not None and flipped:
        mask = mask.flip(-1)
    return Sample(None, latents, mask, cached.original, cached.ltrb, target, conditioning)


def _cut_mask(item: Item, method: str) -> torch.Tensor:
    """The mask of a picture as its cached latents were cut: float32 (H, W) in [0, 1]."""
    assert item.bucket is not None and item.resized is not None
    mask = images.crop_to_bucket(_mask_pixels(item, item.size), item.bucket, item.resized, interpolation=method)[0]
    return torch.from_numpy(mask.astype(np.float32) / 255)


def fits_without_buckets(item: Item, subset: SubsetSettings, base: Size) -> bool:
    """Whether a picture has the training size or may be cut to it."""
    larger = item.size[0] >= base[0] and item.size[1] >= base[1]
    around_face = subset.face_crop_aug_range is not None and images.face_in_name(item.path) is not None
    return item.size == base or (larger and (subset.random_crop or around_face))


def _cut_to_bucket(image: np.ndarray, item: Item, method: str, draw: random.Random | None) -> np.ndarray:
    size = (image.shape[1], image.shape[0])
    if size != item.size:
        raise UserError(
            f"picture {item.path} is {size[0]}x{size[1]} but was {item.size[0]}x{item.size[1]} when it was listed",
            "start again, and delete metadata_cache.json in its folder if there is one",
        )
    assert item.bucket is not None and item.resized is not None
    return images.crop_to_bucket(image, item.bucket, item.resized, draw=draw, interpolation=method)[0]


def _cut_to_base(
    image: np.ndarray, item: Item, subset: SubsetSettings, settings: DatasetSettings, draw: random.Random
) -> np.ndarray:
    assert settings.resolution is not None
    face = images.face_in_name(item.path) if subset.face_crop_aug_range else None
    if face is None or subset.face_crop_aug_range is None:
        return images.crop_exact(image, settings.resolution, draw if subset.random_crop else None, item.path)
    return images.crop_around_face(
        image,
        settings.resolution,
        face,
        subset.face_crop_aug_range,
        draw,
        random_crop=subset.random_crop,
        interpolation=interpolation(settings, subset),
        path=item.path,
    )[0]
