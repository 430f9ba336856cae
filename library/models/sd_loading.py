"""Opening SD 1.x and 2.x models: which parts a file or folder holds, and where their tensors are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models import key_maps
from library.models.assembly import Part, fill, shapes_of
from library.models.checkpoint import Checkpoint, open_checkpoint
from library.models.dimensions import KIND_NAMES, Kind, clip_dimensions, kind_of, openclip_dimensions, unet_config
from library.models.folders import open_part, read_json
from library.models.text_encoders import empty_text_encoder, exchanged_key, text_config
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
            "text_encoder": _text_part(checkpoint, kind, dtype),
        }
        if with_vae:
            parts["vae"] = stability_vae_part(checkpoint, latent_scale, dtype)
    except UserError as error:
        if str(path) in error.problem:
            raise
        raise UserError(f"{path} is no usable model: {error.problem}", error.remedy) from error
    return parts, checkpoint


def filled_folder_parts(
    folder: Path, v2: bool, dtype: torch.dtype, *, with_vae: bool, device: str | torch.device
) -> dict[str, Part]:
    """The parts of a diffusers folder, filled.

    Raises:
        UserError: another family (named), or not a complete model.
    """
    if not (folder / "model_index.json").is_file() and not (folder / "unet").is_dir():
        raise UserError(
            f"{folder} is no model folder (no model_index.json)", "give a diffusers folder or a checkpoint file"
        )
    opened = {name: open_part(folder / name) for name in PARTS if with_vae or name != "vae"}
    _refuse_other_kind(folder, _folder_kind(folder, opened["unet"][0], opened["text_encoder"][0]), v2)
    parts = {}
    for name, (config, checkpoint) in opened.items():
        parts[name] = _folder_part(name, checkpoint, config, dtype)
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
    known = {entry.file_key for entry in entries}
    unexpected = [k for k in checkpoint.tensors if k.startswith(key_maps.UNET_PREFIX) and k not in known]
    return Part("U-Net", module, entries, dtype, unexpected)


def _text_part(checkpoint: Checkpoint, kind: Kind, dtype: torch.dtype) -> Part:
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    if kind == "sd2":
        prefix = key_maps.OPENCLIP_PREFIX
        dimensions = openclip_dimensions(shapes)
        module = empty_text_encoder(text_config(dimensions))
        entries = key_maps.openclip_entries(shapes_of(module), layers=dimensions.layers)
        unused = (f"{prefix}transformer.resblocks.{dimensions.layers}.", f"{prefix}text_projection", f"{prefix}logit_")
    else:
        prefix = key_maps.CLIP_PREFIX
        # The oldest SD 1.x files lack the level `text_model`.
        is_old = not any(key.startswith(prefix + "text_model.") for key in shapes)
        renamed = {_with_level(key, prefix): shape for key, shape in shapes.items()} if is_old else shapes
        dimensions = clip_dimensions(renamed)
        module = empty_text_encoder(text_config(dimensions))
        entries = key_maps.clip_entries(shapes_of(module))
        if is_old:
            cut = len(prefix + "text_model.")
            entries = [key_maps.Entry(prefix + e.file_key[cut:], e.module_keys) for e in entries]
        unused = ()
    known = {entry.file_key for entry in entries}
    unexpected = [
        key
        for key in checkpoint.tensors
        if key.startswith(prefix) and key not in known and not key.startswith(unused) and "position_ids" not in key
    ]
    return Part("text encoder", module, entries, dtype, unexpected)


def _with_level(key: str, prefix: str) -> str:
    return prefix + exchanged_key(key[len(prefix) :]) if key.startswith(prefix) else key


def _folder_part(name: str, checkpoint: Checkpoint, config: dict[str, Any], dtype: torch.dtype) -> Part:
    if name == "vae":
        return diffusers_vae_part(checkpoint, config, dtype)
    if name == "unet":
        module: nn.Module = empty_unet(parse_config(config))
        renamed = {key: key for key in checkpoint.tensors}
    else:
        module = empty_text_encoder(config)
        renamed = {exchanged_key(key): key for key in checkpoint.tensors if "position_ids" not in key}
    ours = shapes_of(module)
    entries = [key_maps.Entry(renamed.get(key, key), (key,)) for key in ours]
    unexpected = [theirs for key, theirs in renamed.items() if key not in ours]
    return Part({"unet": "U-Net", "text_encoder": "text encoder"}[name], module, entries, dtype, unexpected)


def _folder_kind(folder: Path, unet: dict[str, Any], text_encoder: dict[str, Any]) -> Kind:
    if (folder / "text_encoder_2").is_dir() or unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    channels = unet.get("in_channels", 4)
    if channels != 4:
        what = "an inpainting model" if channels == 9 else f"a model with {channels} input channels"
        raise UserError(f"{folder} is {what}", "give a plain text-to-image model")
    return "sd1" if text_encoder.get("hidden_act", "quick_gelu") == "quick_gelu" else "sd2"


def _refuse_other_kind(path: Path, kind: Kind, v2: bool) -> None:
    if kind == "sdxl":
        raise UserError(f"{path} is a model of {KIND_NAMES[kind]}", "use the script of the same name with sdxl_")
    if v2 and kind == "sd1":
        raise UserError(f"{path} is a model of {KIND_NAMES[kind]}, but --v2 is given", "leave out --v2")
    if not v2 and kind == "sd2":
        raise UserError(f"{path} is a model of {KIND_NAMES[kind]}, but --v2 is not given", "give --v2")


def told_by_file(checkpoint: Checkpoint) -> str | None:
    """The prediction type that a file states about itself, None when it says nothing."""
    if "v_pred" in checkpoint.tensors:
        return "v_prediction"
    stated = checkpoint.metadata.get("modelspec.prediction_type")
    return {"v": "v_prediction", "epsilon": "epsilon"}.get(stated or "")


def told_by_folder(folder: Path) -> str | None:
    """The same for a diffusers folder, from its scheduler's config."""
    config = folder / "scheduler" / "scheduler_config.json"
    return read_json(config).get("prediction_type") if config.is_file() else None


def source_of(checkpoint: Checkpoint, parts: dict[str, Part]) -> dict[str, Any]:
    """What a later save needs to carry over the tensors of the source file that belong to no part."""
    taken = {entry.file_key for part in parts.values() for entry in part.entries}
    stat = checkpoint.path.stat()
    return {
        "other_tensors": [key for key in checkpoint.tensors if key not in taken],
        "source_stamp": (stat.st_size, stat.st_mtime_ns),
        "source_epoch": checkpoint.epoch,
        "source_step": checkpoint.global_step,
    }
