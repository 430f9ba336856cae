"""What the writers of all families share: Stability files from key maps, diffusers folders from parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models import key_maps
from library.models.assembly import shapes_of
from library.models.checkpoint_writer import Pending, pending, write_pickle, write_safetensors
from library.models.family import LoadedModel
from library.models.text_encoders import POSITION_IDS, text_state_dict
from library.models.tokenizers import TokenizerKind, write_tokenizer_folder
from library.runtime.files import atomic_folder, check_room

SPEC_KEY, HASH_KEY = "modelspec.sai_model_spec", "modelspec.hash_sha256"
V_PREDICTION_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}


# Stability files


def write_stability(
    model: LoadedModel,
    target: str | Path,
    items: Iterable[Pending],
    *,
    safetensors: bool,
    metadata: Mapping[str, str] | None,
    epoch: int,
    step: int,
) -> int:
    """Write the tensors of a model as one file; returns their number.

    Args:
        safetensors: else a pickle `{"state_dict", "epoch", "global_step"}`.
        metadata: safetensors only; with ModelSpec's keys it gets the hash of the data.
        epoch, step: pickles only; counted on from those of the source.
    """
    if safetensors:
        hash_key = HASH_KEY if metadata and SPEC_KEY in metadata else None
        return write_safetensors(target, items, metadata, hash_key)
    wrapper = {
        "epoch": _counted_on(model.extras.get("source_epoch"), epoch),
        "global_step": _counted_on(model.extras.get("source_step"), step),
    }
    return write_pickle(target, items, wrapper)


def _counted_on(before: Any, now: int) -> int:
    return before + now if isinstance(before, int) and not isinstance(before, bool) else now


def through_entries(
    state: Mapping[str, torch.Tensor], entries: Iterable[key_maps.Entry], dtype: torch.dtype | None
) -> list[Pending]:
    """The tensors of a module under their names in a Stability file, floating ones as `dtype` (None: as they are)."""
    items = []
    for entry in entries:
        tensors = [state[key] for key in entry.module_keys]
        target = dtype if dtype is not None and tensors[0].is_floating_point() else tensors[0].dtype
        shape = entry.file_shape([tensor.shape for tensor in tensors])
        items.append(Pending(entry.file_key, target, shape, lambda e=entry, t=tensors: e.to_file(t)))
    return items


def vae_tensors(vae: Any, dtype: torch.dtype | None) -> list[Pending]:
    """A VAE under its names in a Stability file."""
    levels, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    entries = key_maps.vae_entries(shapes_of(vae), levels=levels, layers=layers)
    return through_entries(vae.state_dict(), entries, dtype)


def clip_tensors(text_encoder: nn.Module, dtype: torch.dtype | None, prefix: str) -> list[Pending]:
    """A text encoder that keeps transformers' names in a file, with the position ids that other programs look for."""
    text = text_state_dict(text_encoder)
    entries = key_maps.clip_entries({key: tuple(value.shape) for key, value in text.items()}, prefix=prefix)
    positions = torch.arange(text["text_model.embeddings.position_embedding.weight"].shape[0])[None]
    return [*through_entries(text, entries, dtype), pending(prefix + POSITION_IDS, positions)]


def marker_tensors(model: LoadedModel) -> list[Pending]:
    """Empty tensors by which other programs recognise v-prediction and zero terminal SNR."""
    marks = []
    if model.prediction_type == "v_prediction":
        marks.append(V_PREDICTION_MARK)
    if model.extras.get("zero_terminal_snr"):
        marks.append(ZERO_SNR_MARK)
    return [pending(name, torch.empty(0)) for name in marks]


def refuse_indescribable(facts: Iterable[tuple[str, Any, Any]]) -> None:
    """A Stability file has no room for numbers that its shapes do not show; refuse models that need them.

    Args:
        facts: (name, the model's value, what a file means).
    """
    for what, value, meant in facts:
        if value != meant:
            raise UserError(
                f"a single file cannot say that this model has {what} {value} (it means {meant})",
                "save it as a diffusers folder (--save_model_as diffusers_safetensors)",
            )


# diffusers folders


@dataclass(frozen=True)
class FolderPart:
    """A subfolder with weights: its name, `config.json`, tensors, and the stem of its weight file."""

    name: str
    config: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]
    stem: str = "diffusion_pytorch_model"


def vae_part(model: LoadedModel, **settings: Any) -> FolderPart:
    """The VAE's subfolder; `settings` replace what its config says."""
    own = {key: value for key, value in dict(model.vae.config).items() if not key.startswith("_")}
    return FolderPart("vae", own | {"_class_name": "AutoencoderKL"} | settings, model.vae.state_dict())


def text_stem(safetensors: bool) -> str:
    """Stem of a text encoder's weight file."""
    return "model" if safetensors else "pytorch_model"


def scheduler_config(model: LoadedModel, class_name: str) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`, with the model's prediction type."""
    config = SCHEDULE | {"_class_name": class_name, "prediction_type": model.prediction_type}
    if model.extras.get("zero_terminal_snr"):
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def write_folder(
    model: LoadedModel,
    target: str | Path,
    parts: Sequence[FolderPart],
    *,
    index: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    tokenizers: Mapping[str, TokenizerKind],
    safetensors: bool,
    dtype: torch.dtype | None,
) -> None:
    """Write a diffusers folder, which replaces an earlier one of that name as a whole.

    Args:
        index: `model_index.json`.
        tokenizers: subfolder -> which vocabulary it gets when the source has none.
        safetensors: else `.bin` pickles.
        dtype: of floating tensors; None writes them as they are.

    Raises:
        UserError: the disk has no room, or the folder may not be written.
    """
    target = Path(target)
    tensors = {part.name: [pending(k, v, dtype) for k, v in part.state.items()] for part in parts}
    check_room(target.parent, sum(item.size for items in tensors.values() for item in items))
    with atomic_folder(target) as folder:
        for part in parts:
            _write_json(folder / part.name / "config.json", part.config)
            if safetensors:
                path = folder / part.name / f"{part.stem}.safetensors"
                write_safetensors(path, tensors[part.name], {"format": "pt"})
            else:
                write_pickle(folder / part.name / f"{part.stem}.bin", tensors[part.name])
        _write_json(folder / "model_index.json", index)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        for name, kind in tokenizers.items():
            _write_tokenizer(model, folder / name, kind)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(model: LoadedModel, folder: Path, kind: TokenizerKind) -> None:
    """The source folder's tokenizer, which may have added words; else the shipped vocabulary."""
    source = Path(model.extras["folder"]) / folder.name if "folder" in model.extras else None
    if source is not None and (source / "vocab.json").is_file():
        shutil.copytree(source, folder)
    else:
        write_tokenizer_folder(folder, kind)
