"""What only SDXL trainings have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.messages import UserError, warn_once
from library.options.declare import option

# Sides of SDXL's buckets are multiples of it: the U-Net halves latents twice.
BUCKET_STEPS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SdxlConfig:
    """What only SDXL trainings have."""

    cache_text_encoder_outputs: bool = option(
        False, "encode each caption once before training and send the text encoders away; they cannot be trained then"
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "keep the encoded captions in files beside the pictures; switches --cache_text_encoder_outputs on"
    )
    disable_mmap_load_safetensors: bool = option(
        False, "read safetensors files without mapping them into memory, which this program never does"
    )


def verify_sdxl_training_args(
    args: Any, supportTextEncoderCaching: bool = True, *, support_text_encoder_caching: bool | None = None
) -> None:
    """Check options of an SDXL training; switches the text cache on where it is to be kept on disk.

    Args:
        args: a namespace; the second argument has another name in later releases of sd-scripts, both are taken.

    Raises:
        UserError: options that SDXL cannot have.
    """
    caching = supportTextEncoderCaching if support_text_encoder_caching is None else support_text_encoder_caching
    if args.v2:
        raise UserError("--v2 with an SDXL training", "leave it out: the model's size follows from its file")
    if getattr(args, "weighted_captions", False):
        raise UserError("--weighted_captions is not there for SDXL", "leave it out")
    if getattr(args, "clip_skip", None) is not None:
        warn_once("--clip_skip has no effect: SDXL always takes the layer before the last")
    if caching:
        switch_text_cache_on(args)


def switch_text_cache_on(args: Any) -> None:
    """`--cache_text_encoder_outputs` where only the form on disk was asked for."""
    if getattr(args, "cache_text_encoder_outputs_to_disk", False) and not args.cache_text_encoder_outputs:
        warn_once("--cache_text_encoder_outputs_to_disk switches --cache_text_encoder_outputs on")
        args.cache_text_encoder_outputs = True


def require_frozen_encoders(cached: bool, unet_only: bool) -> None:
    """Cached text leaves the text encoders nothing to learn from.

    Raises:
        UserError: they would be trained.
    """
    if cached and not unet_only:
        raise UserError(
            "--cache_text_encoder_outputs while the text encoders are trained",
            "add --network_train_unet_only, or leave --cache_text_encoder_outputs out",
        )
