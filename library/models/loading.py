"""What the readers of all families share: text encoders, folder parts, and what a source says about its prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.messages import UserError, log
from library.models import key_maps
from library.models.assembly import Part, shapes_of
from library.models.checkpoint import Checkpoint
from library.models.dimensions import clip_dimensions
from library.models.folders import read_json
from library.models.saving import V_PREDICTION_MARK, ZERO_SNR_MARK
from library.models.text_encoders import empty_text_encoder, exchanged_key, text_config

MODEL_FOLDER_FILES = ("scheduler", "tokenizer")


# Parts


def clip_part(checkpoint: Checkpoint, prefix: str, dtype: torch.dtype, *, name: str = "text encoder") -> Part:
    """A text encoder that keeps transformers' names below `prefix`, ready to fill."""
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    # The oldest SD 1.x files lack the level `text_model`.
    is_old = not any(key.startswith(prefix + "text_model.") for key in shapes)
    renamed = {_with_level(key, prefix): shape for key, shape in shapes.items()} if is_old else shapes
    module = empty_text_encoder(text_config(clip_dimensions(renamed, prefix)))
    entries = key_maps.clip_entries(shapes_of(module), prefix=prefix)
    if is_old:
        cut = len(prefix + "text_model.")
        entries = [key_maps.Entry(prefix + e.file_key[cut:], e.module_keys) for e in entries]
    return Part(name, module, entries, dtype, strangers(checkpoint, prefix, entries))


def _with_level(key: str, prefix: str) -> str:
    return prefix + exchanged_key(key[len(prefix) :]) if key.startswith(prefix) else key


def strangers(
    checkpoint: Checkpoint, prefix: str, entries: list[key_maps.Entry], unused: tuple[str, ...] = ()
) -> list[str]:
    """Tensors below a part's prefix that have no place in it; position ids and `unused` ones may be there."""
    known = {entry.file_key for entry in entries}
    return [
        key
        for key in checkpoint.tensors
        if key.startswith(prefix) and key not in known and not key.startswith(unused) and "position_ids" not in key
    ]


def folder_text_part(
    checkpoint: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype, *, name: str = "text encoder"
) -> Part:
    """A text encoder of a diffusers folder, with names of any version of transformers, ready to fill."""
    renamed = {exchanged_key(key): key for key in checkpoint.tensors if "position_ids" not in key}
    return renamed_part(name, empty_text_encoder(config), checkpoint, renamed, dtype)


def renamed_part(
    name: str, module: nn.Module, checkpoint: Checkpoint, renamed: Mapping[str, str], dtype: torch.dtype
) -> Part:
    """A part whose tensors have other names in the file, nothing else.

    Args:
        renamed: our name -> name in the file; what has no entry is looked for under our name.
    """
    ours = shapes_of(module)
    entries = [key_maps.Entry(renamed.get(key, key), (key,)) for key in ours]
    return Part(name, module, entries, dtype, [theirs for key, theirs in renamed.items() if key not in ours])


def refuse_no_model_folder(folder: Path) -> None:
    """Stop at a folder that is none of a diffusers pipeline."""
    if not (folder / "model_index.json").is_file() and not (folder / "unet").is_dir():
        raise UserError(
            f"{folder} is no model folder (no model_index.json)", "give a diffusers folder or a checkpoint file"
        )


def name_the_file(path: Path, error: UserError) -> UserError:
    """An error about what a file holds, with the file's name in it."""
    if str(path) in error.problem:
        return error
    return UserError(f"{path} is no usable model: {error.problem}", error.remedy)


# What a source says about itself


@dataclass(frozen=True)
class Told:
    """How a model wants to be sampled, as its file or folder says it; None where it says nothing."""

    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None


def told_by_file(checkpoint: Checkpoint) -> Told:
    """Marker tensors first, then ModelSpec's metadata."""
    if V_PREDICTION_MARK in checkpoint.tensors:
        return Told("v_prediction", ZERO_SNR_MARK in checkpoint.tensors)
    stated = checkpoint.metadata.get("modelspec.prediction_type", "")
    zero_snr = True if ZERO_SNR_MARK in checkpoint.tensors else None
    return Told({"v": "v_prediction", "epsilon": "epsilon"}.get(stated), zero_snr)


def told_by_folder(folder: Path) -> Told:
    """The same for a diffusers folder, from its scheduler's config."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path) if path.is_file() else {}
    return Told(config.get("prediction_type"), config.get("rescale_betas_zero_snr"))


def compare_with_run(
    source: str | Path, told: Told, *, v_parameterization: bool, zero_terminal_snr: bool | None
) -> dict[str, Any]:
    """Warn where a run uses a model in another way than it says of itself.

    Args:
        zero_terminal_snr: None for callers that neither train nor sample: the model keeps what it says.

    Returns:
        For `LoadedModel.extras`: what the source says, and whether a file written from the model is marked.
    """
    used = "v_prediction" if v_parameterization else "epsilon"
    if told.prediction_type is not None and told.prediction_type != used:
        advice = "give" if told.prediction_type == "v_prediction" else "leave out"
        log.warning(
            f"{source} says that it predicts {told.prediction_type}, but the run uses {used}; "
            f"if that is not intended, {advice} --v_parameterization"
        )
    if told.zero_terminal_snr and zero_terminal_snr is False:
        log.warning(
            f"{source} says that it was trained with zero terminal SNR, but the run does not use it; "
            "if that is not intended, give --zero_terminal_snr"
        )
    kept = bool(told.zero_terminal_snr) and told.prediction_type in (None, used)
    return {
        "told_prediction_type": told.prediction_type,
        "zero_terminal_snr": kept if zero_terminal_snr is None else zero_terminal_snr,
    }


def source_of(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> dict[str, Any]:
    """What a later save needs to carry over the tensors of the source file that belong to no part."""
    taken = {entry.file_key for part in parts.values() for entry in part.entries}
    stat = checkpoint.path.stat()
    return {
        "other_tensors": [key for key in checkpoint.tensors if key not in taken],
        "source_stamp": (stat.st_size, stat.st_mtime_ns),
        "source_epoch": checkpoint.epoch,
        "source_step": checkpoint.global_step,
    }
