"""Where the pictures are and how they are read; the same names are keys of a data-set file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Where the pictures are and how they are read; the same names are keys of a data-set file."""

    train_data_dir: str | None = option(None, "")
    reg_data_dir: str | None = option(None, "")
    in_json: str | None = option(None, "")
    conditioning_data_dir: str | None = option(None, "")
    dataset_config: Path | None = option(None, "")
    dataset_class: str | None = option(None, "")
    dataset_repeats: int = option(1, "")
    resolution: str | None = option(None, "")
    train_batch_size: int = option(1, "")
    enable_bucket: bool = option(False, "")
    min_bucket_reso: int = option(256, "")
    max_bucket_reso: int = option(1024, "")
    bucket_reso_steps: int = option(64, "")
    bucket_no_upscale: bool = option(False, "")
    caption_extension: str = option(".caption", "")
    caption_extention: str | None = option(None, "")
    caption_separator: str = option(",", "")
    keep_tokens: int = option(0, "")
    keep_tokens_separator: str = option("", "")
    secondary_separator: str | None = option(None, "")
    enable_wildcard: bool = option(False, "")
    shuffle_caption: bool = option(False, "")
    caption_prefix: str | None = option(None, "")
    caption_suffix: str | None = option(None, "")
    token_warmup_min: int = option(1, "")
    token_warmup_step: float = option(0, "")
    caption_dropout_rate: float = option(0.0, "")
    caption_dropout_every_n_epochs: int = option(0, "")
    caption_tag_dropout_rate: float = option(0.0, "")
    color_aug: bool = option(False, "")
    flip_aug: bool = option(False, "")
    face_crop_aug_range: str | None = option(None, "")
    random_crop: bool = option(False, "")
    resize_interpolation: str | None = option(
        None, "", choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")
    )
    alpha_mask: bool = option(False, "")
    cache_info: bool = option(False, "")
    cache_latents: bool = option(False, "")
    cache_latents_to_disk: bool = option(False, "")
    vae_batch_size: int = option(1, "")
    skip_cache_check: bool = option(False, "")
    debug_dataset: bool = option(False, "")
    prior_loss_weight: float = option(1.0, "")
    validation_seed: int | None = option(None, "")
    validation_split: float = option(0.0, "")
