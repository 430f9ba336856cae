"""Writing SD 1.x and 2.x models: one file in Stability layout, or a diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from library.messages import UserError, warn_once
from library.models import key_maps
from library.models.assembly import shapes_of
from library.models.checkpoint import open_checkpoint
from library.models.checkpoint_writer import Pending, pending, write_pickle, write_safetensors
from library.models.family import LoadedModel
from library.models.sd_loading import sd_unet_key_map
from library.models.text_encoders import POSITION_IDS, saved_text_config, text_state_dict
from library.models.tokenizers import CLIP_L, OPENCLIP_H, write_tokenizer_folder
from library.runtime.files import atomic_folder, check_room

SPEC_KEY, HASH_KEY = "modelspec.sai_model_spec", "modelspec.hash_sha256"
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
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
        safetensors: else a pickle `{"state_dict", "epoch", "global_step"}`.
        dtype: of floating tensors; None writes them as they are.
        metadata: safetensors only.
        epoch, step: pickles only; counted on from those of the source.

    Returns:
        Number of tensors.

    Raises:
        UserError: the layout cannot describe this model, or the disk has no room.
    """
    _refuse_indescribable(model)
    items = {item.name: item for item in stability_tensors(model, dtype)}
    for item in _carried_over(model):
        items.setdefault(item.name, item)
    if is_v2(model):
        for item in unused_v2_tensors(text_state_dict(model.text_encoders[0]), dtype):
            items.setdefault(item.name, item)
    for item in _markers(model):
        items[item.name] = item
    if safetensors:
        hash_key = HASH_KEY if metadata and SPEC_KEY in metadata else None
        return write_safetensors(target, items.values(), metadata, hash_key)
    wrapper = {
        "epoch": _counted_on(model.extras.get("source_epoch"), epoch),
        "global_step": _counted_on(model.extras.get("source_step"), step),
    }
    return write_pickle(target, items.values(), wrapper)


def stability_tensors(model: LoadedModel, dtype: torch.dtype | None) -> list[Pending]:
    """The three parts under their names in a Stability file."""
    v2 = is_v2(model)
    text = text_state_dict(model.text_encoders[0])
    text_shapes = {key: tuple(value.shape) for key, value in text.items()}
    if v2:
        text_entries = key_maps.openclip_entries(text_shapes, layers=_text_layers(model))
    else:
        text_entries = key_maps.clip_entries(text_shapes)
    unet_entries = key_maps.unet_entries(
        shapes_of(model.unet), sd_unet_key_map(model.unet.config), linear_projections=v2
    )
    items = [
        *_through_entries(model.unet.state_dict(), unet_entries, dtype),
        *_through_entries(text, text_entries, dtype),
    ]
    if model.vae is not None:
        config = model.vae.config
        levels, layers = len(config.block_out_channels), config.layers_per_block
        vae_entries = key_maps.vae_entries(shapes_of(model.vae), levels=levels, layers=layers)
        items += _through_entries(model.vae.state_dict(), vae_entries, dtype)
    if not v2:
        positions = torch.arange(text["text_model.embeddings.position_embedding.weight"].shape[0])[None]
        items.append(pending(key_maps.CLIP_PREFIX + POSITION_IDS, positions))
    return items


def _through_entries(
    state: Mapping[str, torch.Tensor], entries: Iterable[key_maps.Entry], dtype: torch.dtype | None
) -> list[Pending]:
    items = []
    for entry in entries:
        tensors = [state[key] for key in entry.module_keys]
        target = dtype if dtype is not None and tensors[0].is_floating_point() else tensors[0].dtype
        shape = entry.file_shape([tensor.shape for tensor in tensors])
        items.append(Pending(entry.file_key, target, shape, lambda e=entry, t=tensors: e.to_file(t)))
    return items


def _text_layers(model: LoadedModel) -> int:
    return model.text_encoders[0].config.num_hidden_layers


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
    for item in _through_entries(text, key_maps.openclip_entries(shapes, layers=count), dtype):
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
    names = [n for n in names if n not in ("v_pred", "ztsnr")]
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


def _markers(model: LoadedModel) -> list[Pending]:
    """Empty tensors by which other programs recognise v-prediction and zero terminal SNR in SD 1.x files."""
    if is_v2(model):
        return []
    marks = []
    if model.prediction_type == "v_prediction":
        marks.append("v_pred")
    if model.extras.get("zero_terminal_snr"):
        marks.append("ztsnr")
    return [pending(name, torch.empty(0)) for name in marks]


def _counted_on(before: Any, now: int) -> int:
    return before + now if isinstance(before, int) and not isinstance(before, bool) else now


def _refuse_indescribable(model: LoadedModel) -> None:
    """A Stability file has no room for numbers that its shapes do not show; refuse models that need them."""
    unet, text = model.unet.config, model.text_encoders[0].config
    vae = model.vae.config if model.vae is not None else None
    heads = tuple(max(1, width // 64) for width in unet.block_out_channels) if is_v2(model) else None
    activation = "gelu" if is_v2(model) else "quick_gelu"
    facts = (
        ("U-Net norm groups", unet.norm_num_groups, 32),
        ("VAE norm groups", vae.norm_num_groups if vae else 32, 32),
        ("U-Net attention heads", unet.heads, heads or (8,) * len(unet.block_out_channels)),
        ("text encoder heads", text.num_attention_heads, max(1, text.hidden_size // 64)),
        ("text encoder activation", text.hidden_act, activation),
    )
    for what, value, needed in facts:
        if value != needed:
            raise UserError(
                f"a single file cannot say that this model has {what} {value} (it means {needed})",
                "save it as a diffusers folder (--save_model_as diffusers_safetensors)",
            )


def save_folder(
    model: LoadedModel, target: str | Path, *, safetensors: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Write a diffusers folder, which replaces an earlier one of that name as a whole.

    Args:
        safetensors: else `.bin` pickles.
        dtype: of floating tensors; None writes them as they are.

    Raises:
        UserError: the disk has no room, or the folder may not be written.
    """
    target = Path(target)
    parts = {
        "unet": (_unet_config(model), model.unet.state_dict(), "diffusion_pytorch_model"),
        "vae": (_vae_config(model), model.vae.state_dict(), "diffusion_pytorch_model"),
        "text_encoder": (
            saved_text_config(model.text_encoders[0]),
            text_state_dict(model.text_encoders[0]),
            "model" if safetensors else "pytorch_model",
        ),
    }
    tensors = {name: [pending(k, v, dtype) for k, v in state.items()] for name, (_, state, _) in parts.items()}
    check_room(target.parent, sum(item.size for items in tensors.values() for item in items))
    with atomic_folder(target) as folder:
        for name, (config, _, stem) in parts.items():
            _write_json(folder / name / "config.json", config)
            if safetensors:
                write_safetensors(folder / name / f"{stem}.safetensors", tensors[name], {"format": "pt"})
            else:
                write_pickle(folder / name / f"{stem}.bin", tensors[name])
        _write_json(folder / "model_index.json", MODEL_INDEX)
        _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(model))
        _write_tokenizer(model, folder / "tokenizer")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _unet_config(model: LoadedModel) -> dict[str, Any]:
    config = model.unet.config.to_diffusers()
    if is_v2(model) and model.prediction_type == "v_prediction" and model.is_stability_layout:
        config["sample_size"] = 96  # SD 2.x with v-prediction is made for 768 pixels; single files do not say so
    return config


def _vae_config(model: LoadedModel) -> dict[str, Any]:
    return {k: v for k, v in dict(model.vae.config).items() if not k.startswith("_")} | {"_class_name": "AutoencoderKL"}


def _scheduler_config(model: LoadedModel) -> dict[str, Any]:
    config = SCHEDULER | {"prediction_type": model.prediction_type}
    if model.extras.get("zero_terminal_snr"):
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _write_tokenizer(model: LoadedModel, folder: Path) -> None:
    """The source folder's tokenizer, which may have added words; else the shipped vocabulary."""
    source = Path(model.extras["folder"]) / "tokenizer" if "folder" in model.extras else None
    if source is not None and (source / "vocab.json").is_file():
        shutil.copytree(source, folder)
    else:
        write_tokenizer_folder(folder, OPENCLIP_H if is_v2(model) else CLIP_L)
