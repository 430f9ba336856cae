"""Where the pictures are and how they are read; the same names are keys of a data-set file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Where the pictures are and how they are read; the same names are keys of a data-set file."""

    train_data_dir: str | None = option(
        None, "folder of training pictures; in DreamBooth form it holds folders named REPEATS_NAME"
    )
    reg_data_dir: str | None = option(None, "folder of regularisation pictures in folders named REPEATS_NAME")
    in_json: str | None = option(
        None, "metadata file (.json or .jsonl) with captions and sizes; selects the fine-tuning kind of data set"
    )
    conditioning_data_dir: str | None = option(
        None, "folder of conditioning pictures, or of masks for --masked_loss, with the names of the training pictures"
    )
    dataset_config: Path | None = option(
        None, "TOML or JSON file that describes the data sets; replaces --train_data_dir, --reg_data_dir and --in_json"
    )
    dataset_class: str | None = option(None, "data set class of your own as package.module.Class")
    dataset_repeats: int = option(1, "how often each picture of --in_json is used per epoch")
    resolution: str | None = option(None, "training resolution in pixels: one number, or WIDTH,HEIGHT")
    train_batch_size: int = option(1, "pictures per device and micro-step")
    skip_image_resolution: str | None = option(
        None, "leave out pictures of at most this many pixels: one number squared, or WIDTH,HEIGHT multiplied"
    )
    enable_bucket: bool = option(False, "train pictures of different shapes in buckets of equal shape")
    min_bucket_reso: int = option(256, "smallest side of a bucket in pixels")
    max_bucket_reso: int = option(1024, "largest side of a bucket in pixels")
    bucket_reso_steps: int = option(64, "bucket sides are multiples of this many pixels")
    bucket_no_upscale: bool = option(False, "never enlarge a picture; buckets then follow the pictures' own sizes")
    caption_extension: str = option(".caption", "ending of the caption files beside the pictures")
    caption_extention: str | None = option(None, "old spelling of --caption_extension; replaces it when given")
    caption_separator: str = option(
        ",", "text between the parts of a caption that --shuffle_caption and --keep_tokens count"
    )
    keep_tokens: int = option(0, "number of leading caption parts that are neither shuffled nor dropped")
    keep_tokens_separator: str = option(
        "",
        "mark that ends the kept parts of a caption, and a second one the shuffled parts; replaces --keep_tokens",
    )
    secondary_separator: str | None = option(
        None, "mark between caption parts that stay together when shuffled or dropped; becomes the separator afterwards"
    )
    enable_wildcard: bool = option(
        False, "choose one of {a|b|c} in captions, and one line of a caption of several lines"
    )
    shuffle_caption: bool = option(False, "shuffle the parts of each caption every time it is used")
    caption_prefix: str | None = option(None, "text put before every caption")
    caption_suffix: str | None = option(None, "text put after every caption")
    token_warmup_min: int = option(1, "caption parts used at the first step of the token warm-up")
    token_warmup_step: float = option(
        0, "step at which all caption parts are used; below 1 it is a share of all steps, 0 switches the warm-up off"
    )
    caption_dropout_rate: float = option(0.0, "probability from 0 to 1 that a caption is left empty")
    caption_dropout_every_n_epochs: int = option(0, "leave all captions empty in every N-th epoch (0 = never)")
    caption_tag_dropout_rate: float = option(0.0, "probability from 0 to 1 that a caption part is left out")
    color_aug: bool = option(False, "change hue and gamma a little at random; not together with --cache_latents")
    flip_aug: bool = option(False, "mirror half of the pictures from left to right at random")
    face_crop_aug_range: str | None = option(
        None,
        "crop around the face that the file name gives, by a factor between MIN,MAX; not together with --cache_latents",
    )
    random_crop: bool = option(False, "crop at a random place instead of the centre; not together with --cache_latents")
    resize_interpolation: str | None = option(
        None,
        "how pictures are resized; area when left out, auto takes Lanczos where a picture grows",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "auto"),
    )
    ignore_exif_orientation: bool = option(
        False,
        "use pictures as they are stored, as sd-scripts does; otherwise they are turned as their EXIF data say",
    )
    alpha_mask: bool = option(False, "weigh the loss by the pictures' alpha channel: transparent places do not count")
    cache_info: bool = option(False, "remember sizes and captions of the pictures in a file, for a faster start")
    cache_latents: bool = option(False, "encode every picture once before training and keep its latents in memory")
    cache_latents_to_disk: bool = option(
        False, "as --cache_latents, but kept as .npz files beside the pictures for later runs"
    )
    vae_batch_size: int = option(1, "pictures per call of the VAE")
    skip_cache_check: bool = option(
        False, "take cached latents as they are, without checking that they fit the pictures"
    )
    on_bad_image: str = option(
        "error",
        "what an unreadable picture does: stop the run before it starts, or be left out",
        choices=("error", "skip"),
    )
    debug_dataset: bool = option(
        False, "say what every batch of one epoch holds, write a contact sheet of each bucket, and train nothing"
    )
    prior_loss_weight: float = option(1.0, "weight of the loss of regularisation pictures")
    validation_seed: int | None = option(
        None, "seed that picks the held-out pictures and their noise; --seed when left out"
    )
    validation_split: float = option(
        0.0, "share of the pictures, from 0 to 1, that is held out for the validation loss"
    )
