"""What `finetune/prepare_buckets_latents.py` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketToolConfig:
    """Pictures of a metadata file that get their training sizes and latents."""

    train_data_dir: str = option("", "folder of pictures; the latents go there", flag="train_data_dir")
    in_json: str = option("", "metadata file to read", flag="in_json")
    out_json: str = option("", "metadata file to write; may be the same", flag="out_json")
    model_name_or_path: str = option(
        "",
        "model or VAE that encodes the pictures: a file, a diffusers folder or a Hugging Face name",
        flag="model_name_or_path",
    )
    v2: bool = option(False, "no effect: the VAE is found in models of any version")
    batch_size: int = option(1, "pictures per call of the VAE")
    max_data_loader_n_workers: int | None = option(None, "threads that read pictures ahead; by the cores when left out")
    max_resolution: str = option("512,512", "training resolution as WIDTH,HEIGHT in pixels")
    min_bucket_reso: int = option(256, "smallest side of a bucket in pixels")
    max_bucket_reso: int = option(1024, "largest side of a bucket in pixels")
    bucket_reso_steps: int = option(64, "bucket sides are multiples of this many pixels")
    bucket_no_upscale: bool = option(False, "never enlarge a picture; buckets then follow the pictures' own sizes")
    mixed_precision: str = option(
        "no", "number format of the VAE: no (float32), fp16 or bf16", choices=("no", "fp16", "bf16")
    )
    full_path: bool = option(False, "name pictures by their paths, instead of file names without ending")
    flip_aug: bool = option(False, "also the latents of the mirrored pictures")
    alpha_mask: str = option("", "keep the pictures' alpha channels as masks; any value switches it on")
    skip_existing: bool = option(False, "keep latents that hold, instead of making them anew")
    recursive: bool = option(False, "also pictures in all folders below; needs --full_path")
    ignore_exif_orientation: bool = option(
        False, "use pictures as they are stored; otherwise they are turned as their EXIF data say"
    )


def with_mask_values(argv: Sequence[str]) -> list[str]:
    """Arguments in which `--alpha_mask` may stand alone, before another option or at the end."""
    following = [*argv[1:], "--"]
    return [
        "--alpha_mask=on" if argument == "--alpha_mask" and after.startswith("--") else argument
        for argument, after in zip(argv, following, strict=True)
    ]
