"""Writing SD 1.x and 2.x models: one file in Stability layout, or a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.messages import warn_once
from library.models import key_maps
from library.models.assembly import shapes_of
from library.models.checkpoint import open_checkpoint
from library.models.checkpoint_writer import Pending, pending
from library.models.family import LoadedModel
from library.models.saving import (
    V_PREDICTION_MARK,
    ZERO_SNR_MARK,
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
from library.models.sd_loading import sd_unet_key_map
from library.models.text_encoders import saved_text_config, text_state_dict
from library.models.tokenizers import CLIP_L, OPENCLIP_H

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def is_v2(model: LoadedModel) -> bool:
    """Whether a model is SD 2.x."""
    return model.version.startswith("sd_v2")


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
        model: its source file, if it came from one, gives the tensors that belong to no part (and the VAE's,
            if `vae` is None).
        safetensors, metadata, epoch, step: see `library.models.saving.write_stability`.
        dtype: of floating tensors; None writes them as they are.

    Returns:
        Number of tensors.

    Raises:
        UserError: the layout cannot describe this model, or the disk has no room.
    """
    require_describable(model)
    items = {item.name: item for item in stability_tensors(model, dtype)}
    for item in _carried_over(model):
        items.setdefault(item.name, item)
    if is_v2(model):
        for item in unused_v2_tensors(text_state_dict(model.text_encoders[0]), dtype):
            items.setdefault(item.name, item)
    else:
        items |= {item.name: item for item in marker_tensors(model)}
    return write_stability(
        model, target, items.values(), safetensors=safetensors, metadata=metadata, epoch=epoch, step=step
    )


def require_describable(model: LoadedModel) -> None:
    """Refuse a model that a Stability file cannot describe.

    Raises:
        UserError: it has numbers that the shapes in a file do not show.
    """
    refuse_indescribable(_facts(model))


def stability_tensors(model: LoadedModel, dtype: torch.dtype | None) -> list[Pending]:
    """The three parts under their names in a Stability file."""
    v2 = is_v2(model)
    unet_entries = key_maps.unet_entries(
        shapes_of(model.unet), sd_unet_key_map(model.unet.config), linear_projections=v2
    )
    items = through_entries(model.unet.state_dict(), unet_entries, dtype)
    if v2:
        text = text_state_dict(model.text_encoders[0])
        shapes = {key: tuple(value.shape) for key, value in text.items()}
        layers = model.text_encoders[0].config.num_hidden_layers
        items += through_entries(text, key_maps.openclip_entries(shapes, layers=layers), dtype)
    else:
        items += clip_tensors(model.text_encoders[0], dtype, key_maps.CLIP_PREFIX)
    return items if model.vae is None else items + vae_tensors(model.vae, dtype)


def unused_v2_tensors(text: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> list[Pending]:
    """What SD 2.x files hold beside the used layers: one more block (a copy), a projection and a scale.

    No program uses their values; they exist so that loaders find every key they expect.

    Args:
        text: state dict of the text encoder under the exchanged names.
    """
    count = len({key.split(".")[3] for key in text if key.startswith("text_model.encoder.layers.")})
    layer = f"text_model.encoder.layers.{count - 1}."
    shapes = {key: tuple(value.shape) for key, value in text.items() if key.startswith(layer)}
    copies = []
    for item in through_entries(text, key_maps.openclip_entries(shapes, layers=count), dtype):
        name = item.name.replace(f".resblocks.{count - 1}.", f".resblocks.{count}.")
        copies.append(Pending(name, item.dtype, item.shape, item.make))
    embedding = text["text_model.embeddings.token_embedding.weight"]
    projection = torch.ones(embedding.shape[1], embedding.shape[1], dtype=dtype or embedding.dtype)
    scale = torch.tensor(1, dtype=dtype or torch.int64)
    prefix = key_maps.OPENCLIP_PREFIX
    return [*copies, pending(prefix + "text_projection", projection), pending(prefix + "logit_scale", scale)]


def _carried_over(model: LoadedModel) -> list[Pending]:
    """Tensors of the source file that belong to no part, read again when their turn comes."""
    names = [n for n in model.extras.get("other_tensors", ()) if not n.startswith("model_ema.")]
    if len(names) < len(model.extras.get("other_tensors", ())):
        warn_once(f"the EMA weights (model_ema.*) of {model.source} are not written: they are not trained")
    names = [n for n in names if n not in (V_PREDICTION_MARK, ZERO_SNR_MARK)]
    if not names:
        return []
    path = Path(model.source)
    stat = path.stat() if path.is_file() else None
    if stat is None or (stat.st_size, stat.st_mtime_ns) != model.extras.get("source_stamp"):
        warn_once(f"{path} has changed since it was opened: its {len(names)} additional tensors are not written")
        return []
    source = open_checkpoint(path)
    return [
        Pending(name, source.tensors[name].dtype, source.tensors[name].shape, lambda n=name: source.read([n])[n])
        for name in names
    ]


def _facts(model: LoadedModel) -> list[tuple[str, Any, Any]]:
    """What the shapes in a file do not show: (name, the model's value, what a file means)."""
    unet, text = model.unet.config, model.text_encoders[0].config
    vae = model.vae.config if model.vae is not None else None
    heads = tuple(max(1, width // 64) for width in unet.block_out_channels) if is_v2(model) else None
    return [
        ("U-Net norm groups", unet.norm_num_groups, 32),
        ("VAE norm groups", vae.norm_num_groups if vae else 32, 32),
        ("U-Net attention heads", unet.heads, heads or (8,) * len(unet.block_out_channels)),
        ("text encoder heads", text.num_attention_heads, max(1, text.hidden_size // 64)),
        ("text encoder activation", text.hidden_act, "gelu" if is_v2(model) else "quick_gelu"),
    ]


def save_folder(
    model: LoadedModel, target: str | Path, *, safetensors: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Write a diffusers folder (see `library.models.saving.write_folder`)."""
    encoder = model.text_encoders[0]
    parts = [
        FolderPart("unet", _unet_config(model), model.unet.state_dict()),
        vae_part(model),
        FolderPart("text_encoder", saved_text_config(encoder), text_state_dict(encoder), text_stem(safetensors)),
    ]
    write_folder(
        model,
        target,
        parts,
        index=MODEL_INDEX,
        scheduler=scheduler_config(model, "DDIMScheduler"),
        tokenizers={"tokenizer": OPENCLIP_H if is_v2(model) else CLIP_L},
        safetensors=safetensors,
        dtype=dtype,
    )


def _unet_config(model: LoadedModel) -> dict[str, Any]:
    config = model.unet.config.to_diffusers()
    if is_v2(model) and model.prediction_type == "v_prediction" and model.is_stability_layout:
        config["sample_size"] = 96  # SD 2.x with v-prediction is made for 768 pixels; single files do not say so
    return config
