"""What a model file or folder is, told from its directory and configs without reading a weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from library.messages import UserError
from library.models import sd_loading, sdxl_loading
from library.models.assembly import Part
from library.models.checkpoint import Checkpoint
from library.models.converting import PARTS, Source, describe_source
from library.models.dimensions import KIND_NAMES
from library.models.family import family
from library.models.folders import open_part

# Names that are shown of a list of tensors.
LISTED = 10
_UNET = ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "attention_head_dim")
# Tensors that every file of a family has and no program uses.
_UNUSED = r"position_ids$|\.logit_scale$|^cond_stage_model\.model\.(text_projection$|transformer\.resblocks\.{}\.)"
_UNET += ("cross_attention_dim", "use_linear_projection")


def describe_model(path: Path) -> dict[str, Any]:
    """Family, layout, prediction type, number formats, dimensions, and tensors that are missing or have no place.

    Raises:
        UserError: no supported model (what it looks like is named).
    """
    source = describe_source(path)
    parts, files = _file_parts(source) if source.is_file else _folder_parts(source)
    return {
        "path": str(path),
        "kind": "model",
        "family": KIND_NAMES[source.kind],
        "layout": "one file in Stability layout" if source.is_file else "diffusers folder",
        "prediction_type": source.told.prediction_type,
        "zero_terminal_snr": source.told.zero_terminal_snr,
        "number_formats": number_formats(files),
        "tensors": sum(len(file.tensors) for file in files),
        "dimensions": {part.name: _dimensions(part) for part in parts},
        "missing": _missing(parts, files),
        "extra": _extra(parts, files),
        "title": source.metadata.get("modelspec.title", ""),
        "hash": source.metadata.get("modelspec.hash_sha256", ""),
    }


def _file_parts(source: Source) -> tuple[list[Part], list[Checkpoint]]:
    try:
        parts, file = _parts_of(source, with_vae=True)
    except UserError:  # a file without a VAE is described as well
        parts, file = _parts_of(source, with_vae=False)
    return list(parts.values()), [file]


def _parts_of(source: Source, *, with_vae: bool) -> tuple[dict[str, Part], Checkpoint]:
    scale = family("sdxl" if source.kind == "sdxl" else "sd").latent_scale
    if source.kind == "sdxl":
        return sdxl_loading.file_parts(source.path, torch.float32, latent_scale=scale, with_vae=with_vae)
    is_v2 = source.kind == "sd2"
    return sd_loading.file_parts(source.path, is_v2, torch.float32, latent_scale=scale, with_vae=with_vae)


def _folder_parts(source: Source) -> tuple[list[Part], list[Checkpoint]]:
    build = sdxl_loading.folder_part if source.kind == "sdxl" else sd_loading.folder_part
    parts, files = [], []
    for name in (name for name in PARTS if (source.path / name).is_dir()):
        config, file = open_part(source.path / name)
        parts.append(build(name, file, config, torch.float32))
        files.append(file)
    return parts, files


def number_formats(files: Iterable[Checkpoint]) -> dict[str, int]:
    """Number format -> tensors that have it, the commonest first."""
    formats = Counter(str(info.dtype).removeprefix("torch.") for file in files for info in file.tensors.values())
    return dict(formats.most_common())


def _missing(parts: list[Part], files: list[Checkpoint]) -> list[str]:
    if len(files) == 1:  # one file holds all parts
        keys = [e.file_key for part in parts for e in part.entries if e.file_key not in files[0].tensors]
        return keys if any(part.name == "VAE" for part in parts) else ["the whole VAE", *keys]
    return [
        f"{part.name}: {entry.file_key}"
        for part, file in zip(parts, files, strict=True)
        for entry in part.entries
        if entry.file_key not in file.tensors
    ]


def _extra(parts: list[Part], files: list[Checkpoint]) -> list[str]:
    """Tensors without a place in any part: strangers inside one, and whatever else lies in the file."""
    if len(files) > 1:
        return [f"{part.name}: {key}" for part in parts for key in part.unexpected]
    taken = {entry.file_key for part in parts for entry in part.entries}
    layers = next(part.module.config.num_hidden_layers for part in parts if part.name.endswith("text encoder"))
    unused = re.compile(_UNUSED.format(layers))
    return [key for key in files[0].tensors if key not in taken and not unused.search(key)]


def _dimensions(part: Part) -> dict[str, Any]:
    config = part.module.config
    if part.name == "U-Net":
        values = config.to_diffusers()
        chosen = {name: values[name] for name in _UNET if name in values}
        return chosen | {"parameters": _count(part)}
    if part.name == "VAE":
        return {"block_out_channels": list(config.block_out_channels), "latent_channels": config.latent_channels}
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "parameters": _count(part),
    }


def _count(part: Part) -> int:
    return sum(value.numel() for value in part.module.parameters())


def as_lines(description: Mapping[str, Any], depth: int = 0) -> list[str]:
    """A description for a reader: one line a fact, tables indented, long lists cut."""
    lines = []
    for key, value in description.items():
        head = "    " * depth + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            lines += [f"{head}:" if value else f"{head}: none", *as_lines(value, depth + 1)]
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
            lines.append(f"{head}: {len(value)}")
            lines += ["    " * (depth + 1) + item for item in value[:LISTED]]
            if len(value) > LISTED:
                lines.append("    " * (depth + 1) + f"... and {len(value) - LISTED} more")
        elif value is None:
            lines.append(f"{head}: not said")
        elif value != "":
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            lines.append(f"{head}: {text or 'none'}")
    return lines
