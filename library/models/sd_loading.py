"""Opening SD 1.x and 2.x models: which parts a file or folder holds, and where their tensors are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from library.messages import UserError
from library.models import key_maps
from library.models.assembly import Part, fill, shapes_of
from library.models.checkpoint import Checkpoint, open_checkpoint
from library.models.dimensions import KIND_NAMES, Kind, kind_of, openclip_dimensions, unet_config
from library.models.folders import open_part
from library.models.loading import (
    clip_part,
    folder_text_part,
    name_the_file,
    refuse_no_model_folder,
    renamed_part,
    strangers,
)
from library.models.text_encoders import empty_text_encoder, text_config
from library.models.unet_config import CROSS_DOWN, UNetConfig, parse_config
from library.models.unet_sd import UNet2DConditionModel, from_config
from library.models.vae import diffusers_vae_part, stability_vae_part

PARTS = ("unet", "text_encoder", "vae")


def file_parts(
    path: Path, v2: bool, dtype: torch.dtype, *, latent_scale: float, with_vae: bool
) -> tuple[dict[str, Part], Checkpoint]:
    """The parts of a Stability file, ready to fill.

    Raises:
        UserError: another family (named), or not a complete model.
    """
    checkpoint = open_checkpoint(path)
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    try:
        kind = kind_of(shapes)
        _refuse_other_kind(path, kind, v2)
        parts = {
            "unet": _unet_part(checkpoint, unet_config(shapes, kind), kind, dtype),
            "text_encoder": _openclip_part(checkpoint, dtype)
            if kind == "sd2"
            else clip_part(checkpoint, key_maps.CLIP_PREFIX, dtype),
        }
        if with_vae:
            parts["vae"] = stability_vae_part(checkpoint, latent_scale, dtype)
    except UserError as error:
        raise name_the_file(path, error) from error
    return parts, checkpoint


def filled_folder_parts(
    folder: Path, v2: bool, dtype: torch.dtype, *, with_vae: bool, device: str | torch.device
) -> dict[str, Part]:
    """The parts of a diffusers folder, filled.

    Raises:
        UserError: another family (named), or not a complete model.
    """
    refuse_no_model_folder(folder)
    opened = {name: open_part(folder / name) for name in PARTS if with_vae or name != "vae"}
    _refuse_other_kind(folder, folder_kind(folder, opened["unet"][0], opened["text_encoder"][0]), v2)
    parts = {}
    for name, (config, checkpoint) in opened.items():
        parts[name] = folder_part(name, checkpoint, config, dtype)
        fill(checkpoint, [parts[name]], device=device)
    return parts


def sd_unet_key_map(config: UNetConfig) -> key_maps.PrefixMap:
    """The key map of a U-Net of these dimensions."""
    attention = [i for i, kind in enumerate(config.down_block_types) if kind == CROSS_DOWN]
    return key_maps.PrefixMap(key_maps.unet_rules(attention, len(config.block_out_channels), config.layers_per_block))


def empty_unet(config: UNetConfig) -> UNet2DConditionModel:
    """A U-Net without memory (meta device)."""
    with torch.device("meta"):
        return from_config(config).eval()


def _unet_part(checkpoint: Checkpoint, config: UNetConfig, kind: Kind, dtype: torch.dtype) -> Part:
    # SD 2.x files exist in both forms; inside, their projections are always matrices.
    in_file = config.use_linear_projection
    if kind == "sd2":
        config = dataclasses.replace(config, use_linear_projection=True)
    module = empty_unet(config)
    if kind == "sd2":
        # what networks trained on a single SD 2.x file have always been saved as
        for name, layer in module.named_modules():
            if name.endswith((".proj_in", ".proj_out")):
                layer.conv_in_files = True
    entries = key_maps.unet_entries(shapes_of(module), sd_unet_key_map(config), linear_projections=in_file)
    return Part("U-Net", module, entries, dtype, strangers(checkpoint, key_maps.UNET_PREFIX, entries))


def _openclip_part(checkpoint: Checkpoint, dtype: torch.dtype) -> Part:
    prefix = key_maps.OPENCLIP_PREFIX
    dimensions = openclip_dimensions({key: info.shape for key, info in checkpoint.tensors.items()})
    module = empty_text_encoder(text_config(dimensions))
    entries = key_maps.openclip_entries(shapes_of(module), layers=dimensions.layers)
    unused = (f"{prefix}transformer.resblocks.{dimensions.layers}.", f"{prefix}text_projection", f"{prefix}logit_")
    return Part("text encoder", module, entries, dtype, strangers(checkpoint, prefix, entries, unused))


def folder_part(name: str, checkpoint: Checkpoint, config: dict[str, Any], dtype: torch.dtype) -> Part:
    """One part of a diffusers folder (`unet`, `vae`, ...), ready to fill."""
    if name == "vae":
        return diffusers_vae_part(checkpoint, config, dtype)
    if name == "text_encoder":
        return folder_text_part(checkpoint, config, dtype)
    module = empty_unet(parse_config(config))
    return renamed_part("U-Net", module, checkpoint, {key: key for key in checkpoint.tensors}, dtype)


def folder_kind(folder: Path, unet: dict[str, Any], text_encoder: dict[str, Any]) -> Kind:
    """The family of a diffusers folder, from its configs.

    Raises:
        UserError: an inpainting model, or another number of input channels.
    """
    channels = unet.get("in_channels", 4)
    if channels != 4:
        what = "an inpainting model" if channels == 9 else f"a model with {channels} input channels"
        raise UserError(f"{folder} is {what}", "give a plain text-to-image model")
    if (folder / "text_encoder_2").is_dir() or unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd1" if text_encoder.get("hidden_act", "quick_gelu") == "quick_gelu" else "sd2"


def _refuse_other_kind(path: Path, kind: Kind, v2: bool) -> None:
    if kind == "sdxl":
        raise UserError(f"{path} is a model of {KIND_NAMES[kind]}", "use the script of the same name with sdxl_")
    if v2 and kind == "sd1":
        raise UserError(f"{path} is a model of {KIND_NAMES[kind]}, but --v2 is given", "leave out --v2")
    if not v2 and kind == "sd2":
        raise UserError(f"{path} is a model of {KIND_NAMES[kind]}, but --v2 is not given", "give --v2")
