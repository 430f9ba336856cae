"""Names and signatures of sd-scripts' data functions, for programs that import them; nothing inside uses these.

Sizes are (width, height). Where the original drew from Python's global generator, so do these.
"""

from __future__ import annotations

import importlib
import inspect
import os
import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from library.data import images, latents_file
from library.data.buckets import BucketRule, Size, bucket_sizes, crop_ltrb
from library.data.debug import debug_dataset as debug_dataset
from library.data.latents_file import CachedLatents
from library.data.listing import picture_suffixes
from library.messages import UserError, log

Ltrb = tuple[float, float, float, float]

# Endings of picture files, lower and upper case.
IMAGE_EXTENSIONS = [form for suffix in picture_suffixes() for form in (suffix, suffix.upper())]


def default_if_none(value: Any, default: Any) -> Any:
    """The value, or the default if it is None."""
    return default if value is None else value


def image_transforms(image: Any) -> torch.Tensor:
    """uint8 (H, W, 3) or a Pillow picture to float32 (3, H, W) in [-1, 1]."""
    return images.to_tensor(np.asarray(image))


def load_image(image_path: str | os.PathLike[str], alpha: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) of a picture file; 4 channels with `alpha`."""
    return images.read_image(image_path, alpha=alpha)


def trim_and_resize_if_required(
    random_crop: bool, image: np.ndarray, reso: Size, resized_size: Size, resize_interpolation: str | None = None
) -> tuple[np.ndarray, Size, Ltrb]:
    """Resize and cut to a bucket.

    Returns:
        the picture, its original size, crop numbers (left, top, right, bottom).
    """
    original = (image.shape[1], image.shape[0])
    draw = cast(random.Random, random) if random_crop else None
    bucket, resized = (reso[0], reso[1]), (resized_size[0], resized_size[1])
    image, _ = images.crop_to_bucket(image, bucket, resized, draw=draw, interpolation=resize_interpolation)
    return image, original, crop_ltrb(reso, original)


class BucketManager:
    """Buckets of a data set, filled picture by picture.

    Attributes:
        resos: sizes in use, by bucket number.
        reso_to_id: size -> bucket number.
        buckets: items by bucket number.
    """

    def __init__(
        self, no_upscale: bool, max_reso: Size | None, min_size: int | None, max_size: int | None, reso_steps: int
    ) -> None:
        self.no_upscale = no_upscale
        self.max_reso = max_reso
        self.max_area = max_reso[0] * max_reso[1] if max_reso is not None else None
        self.min_size = min_size
        self.max_size = max_size
        self.reso_steps = reso_steps
        self.predefined_resos: list[Size] = []
        self.resos: list[Size] = []
        self.reso_to_id: dict[Size, int] = {}
        self.buckets: list[list[Any]] = []
        self._rule: BucketRule | None = None

    def make_buckets(self) -> None:
        """Make the list of sizes from the resolution and the limits."""
        assert self.max_reso is not None and self.min_size is not None and self.max_size is not None
        self.set_predefined_resos(bucket_sizes(self.max_reso, self.min_size, self.max_size, self.reso_steps))

    def set_predefined_resos(self, resos: Sequence[Size]) -> None:
        """Choose from these sizes."""
        self.predefined_resos = [(width, height) for width, height in resos]
        self._rule = BucketRule(self.predefined_resos)

    def select_bucket(self, image_width: int, image_height: int) -> tuple[Size, Size, float]:
        """Bucket size, resized size and ratio error for a picture; the bucket is made if it is new.

        Raises:
            UserError: the picture is smaller than one step and may not be enlarged.
        """
        if self._rule is None:
            assert self.max_reso is not None
            self._rule = BucketRule(None, base=self.max_reso, step=self.reso_steps)
        fit = self._rule.fit((image_width, image_height))
        if fit is None:
            raise UserError(
                f"a picture of {image_width}x{image_height} is smaller than bucket_reso_steps {self.reso_steps}",
                "leave it out, or turn off bucket_no_upscale",
            )
        self.add_if_new_reso(fit.bucket)
        return fit.bucket, fit.resized, fit.ratio_error

    def add_if_new_reso(self, reso: Size) -> None:
        if reso not in self.reso_to_id:
            self.reso_to_id[reso] = len(self.resos)
            self.resos.append(reso)
            self.buckets.append([])

    def add_image(self, reso: Size, image_or_info: Any) -> None:
        self.buckets[self.reso_to_id[reso]].append(image_or_info)

    def round_to_steps(self, x: float) -> int:
        value = int(x + 0.5)
        return value - value % self.reso_steps

    def shuffle(self) -> None:
        for bucket in self.buckets:
            random.shuffle(bucket)

    def sort(self) -> None:
        """Number the buckets by size."""
        filled = dict(zip(self.resos, self.buckets, strict=True))
        self.resos = sorted(filled)
        self.buckets = [filled[reso] for reso in self.resos]
        self.reso_to_id = {reso: number for number, reso in enumerate(self.resos)}

    @staticmethod
    def get_crop_ltrb(bucket_reso: Size, image_size: Size) -> Ltrb:
        """Crop numbers of a picture of this size."""
        return crop_ltrb(bucket_reso, image_size)


class ImageInfo:
    """One picture of a data set."""

    def __init__(self, image_key: str, num_repeats: int, caption: str, is_reg: bool, absolute_path: str) -> None:
        self.image_key = image_key
        self.num_repeats = num_repeats
        self.caption = caption
        self.is_reg = is_reg
        self.absolute_path = absolute_path
        self.image_size: Size | None = None
        self.resized_size: Size | None = None
        self.bucket_reso: Size | None = None
        self.latents: torch.Tensor | None = None
        self.latents_flipped: torch.Tensor | None = None
        self.latents_npz: str | None = None
        self.latents_original_size: Size | None = None
        self.latents_crop_ltrb: Ltrb | None = None
        self.alpha_mask: torch.Tensor | None = None
        self.cond_img_path: str | None = None
        self.image: Any = None
        self.text_encoder_outputs_npz: str | None = None
        self.text_encoder_outputs1: torch.Tensor | None = None
        self.text_encoder_outputs2: torch.Tensor | None = None
        self.text_encoder_pool2: torch.Tensor | None = None


class ImageLoadingDataset(torch.utils.data.Dataset):
    """Pictures as (float32 (3, H, W) in [-1, 1], path); None for files that cannot be read, with a warning."""

    def __init__(self, image_paths: Sequence[str | os.PathLike[str]]) -> None:
        self.images = image_paths

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, str] | None:
        path = str(self.images[idx])
        try:
            return images.to_tensor(images.read_image(path)), path
        except UserError as error:
            log.warning("%s", error)
            return None


class collator_class:
    """For a loader of batch size 1: sets epoch and step on the data set and hands the one batch on."""

    def __init__(self, epoch: Any, step: Any, dataset: Any) -> None:
        """
        Args:
            epoch, step: shared integers (`multiprocessing.Value`).
            dataset: used where the code does not run in a loader worker.
        """
        self.current_epoch = epoch
        self.current_step = step
        self.dataset = dataset

    def __call__(self, examples: Sequence[Any]) -> Any:
        worker = torch.utils.data.get_worker_info()
        dataset = worker.dataset if worker is not None else self.dataset
        if dataset is not None:
            dataset.set_current_epoch(self.current_epoch.value)
            dataset.set_current_step(self.current_step.value)
        return examples[0]


def is_disk_cached_latents_is_expected(
    reso: Size, npz_path: str | os.PathLike[str], flip_aug: bool, alpha_mask: bool = False
) -> bool:
    """Whether a latent cache file has the arrays and the size that are wanted."""
    if not os.path.exists(npz_path) or not latents_file.original_accepts(reso, npz_path, flip_aug):
        return False
    header = latents_file.read_header(npz_path)
    return not alpha_mask or (header is not None and "alpha_mask" in header.shapes)


def load_latents_from_disk(
    npz_path: str | os.PathLike[str],
) -> tuple[np.ndarray, list[int], list[float], np.ndarray | None]:
    """Latents, original size, crop numbers and mirrored latents (or None) of a cache file."""
    entry = latents_file.read_latents(npz_path)
    flipped = None if entry.flipped is None else entry.flipped.numpy()
    return entry.latents.numpy(), list(entry.original), list(entry.ltrb), flipped


def save_latents_to_disk(
    npz_path: str | os.PathLike[str],
    latents_tensor: torch.Tensor,
    original_size: Sequence[int],
    crop_ltrb: Sequence[float],
    flipped_latents_tensor: torch.Tensor | None = None,
    alpha_mask: torch.Tensor | None = None,
) -> None:
    """Write a latent cache file."""
    width, height = original_size
    left, top, right, bottom = crop_ltrb
    entry = CachedLatents(
        latents_tensor, (int(width), int(height)), (left, top, right, bottom), flipped_latents_tensor, alpha_mask
    )
    latents_file.write_latents(npz_path, entry)


@torch.no_grad()
def cache_batch_latents(
    vae: Any,
    cache_to_disk: bool,
    image_infos: Sequence[ImageInfo],
    flip_aug: bool,
    random_crop: bool,
    *,
    use_alpha_mask: bool = False,
) -> None:
    """Encode pictures of one bucket; write each one's `latents_npz`, or fill its fields.

    Raises:
        UserError: a picture cannot be read or its latents are not finite.
    """
    pictures, masks = [], []
    for info in image_infos:
        given = None if info.image is None else np.asarray(info.image, dtype=np.uint8)
        image = load_image(info.absolute_path, use_alpha_mask) if given is None else given
        assert info.bucket_reso is not None and info.resized_size is not None
        image, original, ltrb = trim_and_resize_if_required(random_crop, image, info.bucket_reso, info.resized_size)
        info.latents_original_size, info.latents_crop_ltrb = original, ltrb
        pictures.append(images.to_tensor(image[..., :3]))
        masks.append(images.alpha_mask(image) if use_alpha_mask and image.shape[2] == 4 else None)
    stack = torch.stack(pictures).to(vae.device, vae.dtype)
    latents = vae.encode(stack).latent_dist.sample().cpu()
    flipped = vae.encode(stack.flip(-1)).latent_dist.sample().cpu() if flip_aug else None
    for i, info in enumerate(image_infos):
        mirrored = None if flipped is None else flipped[i]
        if not latents[i].isfinite().all() or not (mirrored is None or mirrored.isfinite().all()):
            raise UserError(
                f"the VAE gives no finite latents for {info.absolute_path}", "use it in float32 (--no_half_vae)"
            )
        if cache_to_disk:
            assert info.latents_npz is not None
            assert info.latents_original_size is not None and info.latents_crop_ltrb is not None
            save_latents_to_disk(
                info.latents_npz, latents[i], info.latents_original_size, info.latents_crop_ltrb, mirrored, masks[i]
            )
        else:
            info.latents, info.latents_flipped, info.alpha_mask = latents[i], mirrored, masks[i]


def load_foreign_dataset(
    name: str,
    *,
    tokenizer: Any,
    max_token_length: int | None = None,
    resolution: Size | None = None,
    debug_dataset: bool = False,
) -> Any:
    """Make the data set that `--dataset_class` names; it stands in for the group.

    The constructor gets what its parameters name, or all four in the order of the arguments here.

    Args:
        name: `package.module.Class`, importable.
        tokenizer: one, or a list of two.
        resolution: (width, height).

    Raises:
        UserError: no such module or class, or it is no data set.
    """
    module, _, class_name = name.rpartition(".")
    if not module:
        raise UserError(f"--dataset_class {name} has no module", "give package.module.Class")
    try:
        made = getattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--dataset_class {name}: {error}", "run from the folder that holds it, or set PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UserError(f"--dataset_class {name}: {module} has no {class_name}", "check the name") from error
    values = {
        "tokenizer": tokenizer,
        "max_token_length": max_token_length,
        "resolution": resolution,
        "debug_dataset": debug_dataset,
    }
    parameters = inspect.signature(made).parameters
    named = {key: value for key, value in values.items() if key in parameters}
    if "network_multiplier" in parameters and parameters["network_multiplier"].default is inspect.Parameter.empty:
        named["network_multiplier"] = 1.0
    dataset = made(**named) if "resolution" in named else made(*values.values())
    if not hasattr(dataset, "batch"):
        raise UserError(
            f"--dataset_class {name} is not derived from MinimalDataset",
            "derive it from library.train_util.MinimalDataset",
        )
    return dataset


def make_bucket_resolutions(
    max_reso: Size, min_size: int = 256, max_size: int = 1024, divisible: int = 64
) -> list[Size]:
    """Bucket sizes of about the area of `max_reso`, ascending."""
    return bucket_sizes(max_reso, min_size, max_size, divisible)


def resize_image(
    image: np.ndarray,
    width: int,
    height: int,
    resized_width: int,
    resized_height: int,
    resize_interpolation: str | None = None,
) -> np.ndarray:
    """A picture of (width, height) in another size; without a method: area where it shrinks, else Lanczos."""
    return images.resize(image, (int(resized_width), int(resized_height)), resize_interpolation or "auto")


def pil_resize(image: np.ndarray, size: Size, interpolation: int | None = None) -> np.ndarray:
    """A picture in another size by Pillow.

    Args:
        interpolation: one of Pillow's `Resampling`; None is Lanczos.
    """
    method = Image.Resampling.LANCZOS if interpolation is None else Image.Resampling(interpolation)
    return np.asarray(Image.fromarray(image).resize((int(size[0]), int(size[1])), method))
