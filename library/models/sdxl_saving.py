"""Writing SDXL models: one file in Stability layout, or a diffusers folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models import key_maps
from library.models.assembly import shapes_of
from library.models.checkpoint_writer import Pending, pending
from library.models.dimensions import heads_of
from library.models.family import LoadedModel
from library.models.saving import (
    FolderPart,
    clip_tensors,
    marker_tensors,
    refuse_indescribable,
    scheduler_config,
    text_stem,
    through_entries,
    vae_part,
    vae_tensors,
    write_folder,
    write_stability,
)
from library.models.sdxl_loading import LOGIT_SCALE, sdxl_unet_key_map
from library.models.text_encoders import saved_text_config, text_state_dict
from library.models.tokenizers import CLIP_L, SDXL_FOLDER

# What the second text encoder was published with: ln 100.
DEFAULT_LOGIT_SCALE = math.log(100)
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": False,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_stability(
    model: LoadedModel,
    target: str | Path,
    *,
    safetensors: bool = True,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    epoch: int = 0,
    step: int = 0,
) -> int:
    """Write one file in Stability layout.

    Args:
        model: its parts, the marks of its prediction type and the scale beside the second text encoder are written.
        safetensors, metadata, epoch, step: see `library.models.saving.write_stability`.
        dtype: of floating tensors; None writes them as they are.

    Returns:
        Number of tensors.

    Raises:
        UserError: the layout cannot describe this model, or the disk has no room.
    """
    if model.vae is None:
        raise UserError("the VAE is missing", "give the VAE")
    require_describable(model)
    items = [*stability_tensors(model, dtype), *marker_tensors(model)]
    return write_stability(model, target, items, safetensors=safetensors, metadata=metadata, epoch=epoch, step=step)


def require_describable(model: LoadedModel) -> None:
    """Refuse a model that a Stability file cannot describe.

    Raises:
        UserError: it has numbers that the shapes in a file do not show.
    """
    refuse_indescribable(_facts(model))


def stability_tensors(model: LoadedModel, dtype: torch.dtype | None) -> list[Pending]:
    """The four parts under their names in a Stability file."""
    unet_entries = key_maps.own_entries(shapes_of(model.unet), prefix=key_maps.UNET_PREFIX)
    return [
        *through_entries(model.unet.state_dict(), unet_entries, dtype),
        *clip_tensors(model.text_encoders[0], dtype, key_maps.SDXL_CLIP_PREFIX),
        *openclip_tensors(model.text_encoders[1], dtype),
        _logit_scale(model, dtype),
        *vae_tensors(model.vae, dtype),
    ]


def openclip_tensors(
    text_encoder: nn.Module, dtype: torch.dtype | None, prefix: str = key_maps.SDXL_OPENCLIP_PREFIX
) -> list[Pending]:
    """The second text encoder under its names in a Stability file."""
    text = text_state_dict(text_encoder)
    shapes = {key: tuple(value.shape) for key, value in text.items()}
    entries = key_maps.openclip_entries(shapes, layers=text_encoder.config.num_hidden_layers, prefix=prefix)
    return through_entries(text, entries, dtype)


def _logit_scale(model: LoadedModel, dtype: torch.dtype | None) -> Pending:
    scale = model.extras.get("logit_scale")
    if scale is None:
        scale = torch.tensor(DEFAULT_LOGIT_SCALE)
    return pending(LOGIT_SCALE, torch.as_tensor(scale), dtype)


def _facts(model: LoadedModel) -> list[tuple[str, Any, Any]]:
    """What the shapes in a file do not show: (name, the model's value, what a file means)."""
    unet = model.unet.config
    facts = [
        ("U-Net norm groups", unet.norm_num_groups, 32),
        ("VAE norm groups", model.vae.config.norm_num_groups, 32),
        ("U-Net attention heads", unet.heads, heads_of(unet.block_out_channels)),
    ]
    for name, encoder, activation in zip(("first", "second"), model.text_encoders, ("quick_gelu", "gelu"), strict=True):
        config = encoder.config
        facts += [
            (f"{name} text encoder heads", config.num_attention_heads, max(1, config.hidden_size // 64)),
            (f"{name} text encoder activation", config.hidden_act, activation),
        ]
    return facts


def save_folder(
    model: LoadedModel,
    target: str | Path,
    *,
    latent_scale: float,
    safetensors: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a diffusers folder (see `library.models.saving.write_folder`)."""
    first, second = model.text_encoders
    table, stem = sdxl_unet_key_map(model.unet.config), text_stem(safetensors)
    unet = {_folder_key(key, table): value for key, value in model.unet.state_dict().items()}
    parts = [
        FolderPart("unet", model.unet.config.to_diffusers(), unet),
        # Float16 overflows in SDXL's VAE, so other programs are told to decode in float32.
        vae_part(model, scaling_factor=latent_scale, force_upcast=True),
        FolderPart("text_encoder", saved_text_config(first), text_state_dict(first), stem),
        FolderPart("text_encoder_2", saved_text_config(second), text_state_dict(second), stem),
    ]
    write_folder(
        model,
        target,
        parts,
        index=MODEL_INDEX,
        scheduler=scheduler_config(model, "EulerDiscreteScheduler"),
        tokenizers={"tokenizer": CLIP_L, "tokenizer_2": SDXL_FOLDER},
        safetensors=safetensors,
        dtype=dtype,
    )


def _folder_key(key: str, table: key_maps.PrefixMap) -> str:
    theirs = table.to_diffusers(key)
    if theirs is None:
        raise KeyError(f"no rule for {key}")
    return theirs
