"""Opening SDXL models: which parts a file or folder holds, and where their tensors are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from library.messages import UserError
from library.models import key_maps
from library.models.assembly import Part, fill, shapes_of
from library.models.checkpoint import Checkpoint, PickleCheckpoint, open_checkpoint
from library.models.dimensions import (
    KIND_NAMES,
    Kind,
    kind_of,
    openclip_dimensions,
    projection_width,
    sdxl_unet_config,
)
from library.models.folders import open_part
from library.models.loading import (
    clip_part,
    folder_text_part,
    name_the_file,
    refuse_no_model_folder,
    renamed_part,
    strangers,
)
from library.models.sd_loading import folder_kind
from library.models.text_encoders import PROJECTING, empty_text_encoder, text_config
from library.models.unet_config import CROSS_DOWN, SdxlUNetConfig, parse_sdxl_config
from library.models.unet_sdxl import SdxlUNet2DConditionModel, from_config
from library.models.vae import diffusers_vae_part, stability_vae_part

PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
LOGIT_SCALE = key_maps.SDXL_OPENCLIP_PREFIX + "logit_scale"
_FIRST, _SECOND = "first text encoder", "second text encoder"


def file_parts(
    path: Path, dtype: torch.dtype, *, latent_scale: float, with_vae: bool, text_dtype: torch.dtype | None = None
) -> tuple[dict[str, Part], Checkpoint]:
    """The parts of a Stability file, ready to fill.

    Args:
        dtype: of the weights; `text_dtype` of the text encoders where it differs.

    Raises:
        UserError: another family (named), or not a complete model.
    """
    checkpoint = open_checkpoint(path)
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    try:
        _refuse_other_kind(path, kind_of(shapes))
        parts = {
            "unet": _unet_part(checkpoint, sdxl_unet_config(shapes), dtype),
            "text_encoder": clip_part(checkpoint, key_maps.SDXL_CLIP_PREFIX, text_dtype or dtype, name=_FIRST),
            "text_encoder_2": _second_text_part(checkpoint, text_dtype or dtype),
        }
        if with_vae:
            parts["vae"] = stability_vae_part(checkpoint, latent_scale, dtype)
    except UserError as error:
        raise name_the_file(path, error) from error
    return parts, checkpoint


def filled_folder_parts(
    folder: Path,
    dtype: torch.dtype,
    *,
    with_vae: bool,
    device: str | torch.device,
    text_dtype: torch.dtype | None = None,
) -> dict[str, Part]:
    """The parts of a diffusers folder, filled.

    Args:
        dtype: of the weights; `text_dtype` of the text encoders where it differs.

    Raises:
        UserError: another family (named), or not a complete model.
    """
    refuse_no_model_folder(folder)
    unet, text_encoder = open_part(folder / "unet"), open_part(folder / "text_encoder")
    _refuse_other_kind(folder, folder_kind(folder, unet[0], text_encoder[0]))
    opened = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": open_part(folder / "text_encoder_2")}
    if with_vae:
        opened["vae"] = open_part(folder / "vae")
    parts = {}
    for name, (config, checkpoint) in opened.items():
        own = text_dtype or dtype if name.startswith("text_encoder") else dtype
        parts[name] = folder_part(name, checkpoint, config, own)
        fill(checkpoint, [parts[name]], device=device)
    return parts


def sdxl_unet_key_map(config: SdxlUNetConfig) -> key_maps.PrefixMap:
    """From the names of our U-Net (Stability's) to those in a diffusers folder, for these dimensions."""
    attention = [i for i, kind in enumerate(config.down_block_types) if kind == CROSS_DOWN]
    return key_maps.sdxl_unet_map(attention, len(config.block_out_channels), config.layers_per_block)


def empty_unet(config: SdxlUNetConfig) -> SdxlUNet2DConditionModel:
    """A U-Net without memory (meta device)."""
    with torch.device("meta"):
        return from_config(config).eval()


def _unet_part(checkpoint: Checkpoint, config: SdxlUNetConfig, dtype: torch.dtype) -> Part:
    module = empty_unet(config)
    entries = key_maps.own_entries(shapes_of(module), prefix=key_maps.UNET_PREFIX)
    return Part("U-Net", module, entries, dtype, strangers(checkpoint, key_maps.UNET_PREFIX, entries))


def _second_text_part(checkpoint: Checkpoint, dtype: torch.dtype) -> Part:
    prefix = key_maps.SDXL_OPENCLIP_PREFIX
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    dimensions = openclip_dimensions(shapes, prefix, unused_layers=0)
    dimensions = dataclasses.replace(dimensions, projection=projection_width(shapes, prefix))
    module = empty_text_encoder(text_config(dimensions, PROJECTING))
    entries = key_maps.openclip_entries(shapes_of(module), layers=dimensions.layers, prefix=prefix)
    if prefix + "text_projection" not in shapes:
        # Some files hold the projection as the weight of a linear layer, which is not transposed.
        entries = [
            key_maps.Entry(entry.file_key + ".weight", entry.module_keys)
            if entry.file_key == prefix + "text_projection"
            else entry
            for entry in entries
        ]
    return Part(_SECOND, module, entries, dtype, strangers(checkpoint, prefix, entries, (LOGIT_SCALE,)))


def folder_part(name: str, checkpoint: Checkpoint, config: dict[str, Any], dtype: torch.dtype) -> Part:
    """One part of a diffusers folder (`unet`, `vae`, ...), ready to fill."""
    if name == "vae":
        return diffusers_vae_part(checkpoint, config, dtype)
    if name == "text_encoder":
        return folder_text_part(checkpoint, config, dtype, name=_FIRST)
    if name == "text_encoder_2":
        return folder_text_part(checkpoint, config | {"architectures": [PROJECTING]}, dtype, name=_SECOND)
    record = parse_sdxl_config(config)
    table = sdxl_unet_key_map(record)
    renamed = {table.to_stability(key) or key: key for key in checkpoint.tensors}
    return renamed_part("U-Net", empty_unet(record), checkpoint, renamed, dtype)


def _refuse_other_kind(path: Path, kind: Kind) -> None:
    if kind != "sdxl":
        remedy = "use a script without sdxl_ in its name, such as train_network.py, fine_tune.py, gen_img_diffusers.py"
        raise UserError(f"{path} is a model of {KIND_NAMES[kind]}", remedy)


def logit_scale_of(checkpoint: Checkpoint) -> torch.Tensor | None:
    """A number beside the second text encoder that no program uses and every file has."""
    return checkpoint.read([LOGIT_SCALE])[LOGIT_SCALE] if LOGIT_SCALE in checkpoint.tensors else None


def checkpoint_info(checkpoint: Checkpoint) -> tuple[Any, Any] | None:
    """(epoch, step) of a pickle, zeros where it says nothing; None for a safetensors file."""
    if not isinstance(checkpoint, PickleCheckpoint):
        return None
    return checkpoint.epoch or 0, checkpoint.global_step or 0
