"""Saving of whole models as other programs call it, with a script's namespace and the model's parts.

Nothing inside uses these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from library.models import porch_model_util, porch_sdxl_model_util
from library.models.porch_adapters import get_sai_model_spec
from library.training.classic_training import (
    save_sd_model_on_epoch_end_or_stepwise_common,
    save_sd_model_on_train_end_common,
)

FileSaver = Callable[[str, int, int], None]
FolderSaver = Callable[[str], None]


def save_sd_model_on_train_end(
    args: Any,
    src_path: str | None,
    save_stable_diffusion_format: bool,
    use_safetensors: bool,
    save_dtype: Any,
    epoch: int,
    global_step: int,
    text_encoder: Any,
    unet: Any,
    vae: Any,
) -> None:
    """Save the final model of SD 1.x or 2.x."""
    savers = _sd_savers(args, src_path, use_safetensors, save_dtype, text_encoder, unet, vae)
    save_sd_model_on_train_end_common(args, save_stable_diffusion_format, use_safetensors, epoch, global_step, *savers)


def save_sd_model_on_epoch_end_or_stepwise(
    args: Any,
    on_epoch_end: bool,
    accelerator: Any,
    src_path: str | None,
    save_stable_diffusion_format: bool,
    use_safetensors: bool,
    save_dtype: Any,
    epoch: int,
    num_train_epochs: int,
    global_step: int,
    text_encoder: Any,
    unet: Any,
    vae: Any,
) -> None:
    """Save a model of SD 1.x or 2.x after an epoch if one is due, or after a step."""
    savers = _sd_savers(args, src_path, use_safetensors, save_dtype, text_encoder, unet, vae)
    save_sd_model_on_epoch_end_or_stepwise_common(
        args,
        on_epoch_end,
        accelerator,
        save_stable_diffusion_format,
        use_safetensors,
        epoch,
        num_train_epochs,
        global_step,
        *savers,
    )


def save_sdxl_model_on_train_end(
    args: Any,
    src_path: str | None,
    save_stable_diffusion_format: bool,
    use_safetensors: bool,
    save_dtype: Any,
    epoch: int,
    global_step: int,
    text_encoder1: Any,
    text_encoder2: Any,
    unet: Any,
    vae: Any,
    logit_scale: Any,
    ckpt_info: Any,
) -> None:
    """Save the final model of SDXL."""
    parts = (text_encoder1, text_encoder2, unet, vae, logit_scale, ckpt_info)
    savers = _sdxl_savers(args, src_path, use_safetensors, save_dtype, *parts)
    save_sd_model_on_train_end_common(args, save_stable_diffusion_format, use_safetensors, epoch, global_step, *savers)


def save_sdxl_model_on_epoch_end_or_stepwise(
    args: Any,
    on_epoch_end: bool,
    accelerator: Any,
    src_path: str | None,
    save_stable_diffusion_format: bool,
    use_safetensors: bool,
    save_dtype: Any,
    epoch: int,
    num_train_epochs: int,
    global_step: int,
    text_encoder1: Any,
    text_encoder2: Any,
    unet: Any,
    vae: Any,
    logit_scale: Any,
    ckpt_info: Any,
) -> None:
    """Save a model of SDXL after an epoch if one is due, or after a step."""
    parts = (text_encoder1, text_encoder2, unet, vae, logit_scale, ckpt_info)
    savers = _sdxl_savers(args, src_path, use_safetensors, save_dtype, *parts)
    save_sd_model_on_epoch_end_or_stepwise_common(
        args,
        on_epoch_end,
        accelerator,
        save_stable_diffusion_format,
        use_safetensors,
        epoch,
        num_train_epochs,
        global_step,
        *savers,
    )


def _sd_savers(
    args: Any, source: str | None, use_safetensors: bool, dtype: Any, text_encoder: Any, unet: Any, vae: Any
) -> tuple[FileSaver, FolderSaver]:
    def to_file(path: str, epoch_no: int, step: int) -> None:
        metadata = get_sai_model_spec(None, args, False, False, False, is_stable_diffusion_ckpt=True)
        porch_model_util.save_stable_diffusion_checkpoint(
            args.v2, path, text_encoder, unet, source, epoch_no, step, metadata, dtype, vae
        )

    def to_folder(path: str) -> None:
        porch_model_util.save_diffusers_checkpoint(args.v2, path, text_encoder, unet, source, vae, use_safetensors)

    return to_file, to_folder


def _sdxl_savers(
    args: Any,
    source: str | None,
    use_safetensors: bool,
    dtype: Any,
    text_encoder1: Any,
    text_encoder2: Any,
    unet: Any,
    vae: Any,
    logit_scale: Any,
    ckpt_info: Any,
) -> tuple[FileSaver, FolderSaver]:
    encoders = (text_encoder1, text_encoder2)

    def to_file(path: str, epoch_no: int, step: int) -> None:
        metadata = get_sai_model_spec(None, args, True, False, False, is_stable_diffusion_ckpt=True)
        porch_sdxl_model_util.save_stable_diffusion_checkpoint(
            path, *encoders, unet, epoch_no, step, ckpt_info, vae, logit_scale, metadata, dtype
        )

    def to_folder(path: str) -> None:
        porch_sdxl_model_util.save_diffusers_checkpoint(
            path, *encoders, unet, source, vae, use_safetensors=use_safetensors, save_dtype=dtype
        )

    return to_file, to_folder
