"""ModelSpec: the `modelspec.*` texts in the header of models and networks.

Files carry version 1.0.0; a text that only version 1.0.1 knows (usage hint, thumbnail, ...) makes it 1.0.1.
"""

from __future__ import annotations

import base64
import datetime
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from library.messages import log
from library.models.checkpoint import read_metadata
from library.options.metadata import MetadataConfig

ARCH_SD_V1 = "stable-diffusion-v1"
ARCH_SD_V2_512 = "stable-diffusion-v2-512"
ARCH_SD_V2_768_V = "stable-diffusion-v2-768-v"
ARCH_SD_XL_V1_BASE = "stable-diffusion-xl-v1-base"
ADAPTER_LORA = "lora"
ADAPTER_TEXTUAL_INVERSION = "textual-inversion"
IMPL_STABILITY_AI = "https://github.com/Stability-AI/generative-models"
IMPL_DIFFUSERS = "diffusers"
PRED_TYPE_EPSILON = "epsilon"
PRED_TYPE_V = "v"
MODELSPEC_TITLE = "modelspec.title"
IMPLEMENTATION_VERSION = "sd-training-toolkit/0.1.0"

_TEXTS = ("description", "author", "date", "license", "tags", "merged_from")
_TRAINING = ("prediction_type", "timestep_range", "encoder_layer")
_ORDER_1_0_0 = ("sai_model_spec", "architecture", "implementation", "title", "resolution", *_TEXTS, *_TRAINING)
_ORDER_1_0_1 = ("architecture", "implementation", "title", "resolution", "sai_model_spec", *_TEXTS, *_TRAINING)
BASE_METADATA = dict.fromkeys(f"modelspec.{name}" for name in _ORDER_1_0_0)

Kind = Literal["checkpoint", "lora", "textual_inversion"]


def build_metadata(
    state_dict: Any,
    v2: bool,
    v_parameterization: bool,
    sdxl: bool,
    lora: bool,
    textual_inversion: bool,
    timestamp: float,
    title: str | None = None,
    reso: Any = None,
    is_stable_diffusion_ckpt: bool | None = None,
    author: str | None = None,
    description: str | None = None,
    license: str | None = None,
    tags: str | None = None,
    merged_from: str | None = None,
    timesteps: Any = None,
    clip_skip: int | None = None,
    optional_metadata: Mapping[str, Any] | None = None,
    spec_version: str | None = None,
) -> dict[str, str]:
    """The `modelspec.*` texts of one file (models.md 9.1, 13.6). Argument order is that of earlier programs.

    Args:
        state_dict: not read.
        timestamp: seconds since 1970; dates are local time.
        reso: pair, number, or text `n` or `w,h`; None takes the family's own.
        is_stable_diffusion_ckpt: a checkpoint in Stability layout (None counts as yes).
        timesteps: pair, one number, or text.
        optional_metadata: further texts; names without `modelspec.` get it; they win over computed ones.
        spec_version: `1.0.0` or `1.0.1`; None chooses by `optional_metadata`.

    Raises:
        ValueError: `reso` is a text without numbers.
    """
    kind: Kind = "lora" if lora else "textual_inversion" if textual_inversion else "checkpoint"
    additional = _additional(optional_metadata or {})
    version = spec_version or ("1.0.1" if additional else "1.0.0")
    values = {
        "sai_model_spec": version,
        "architecture": architecture(v2, v_parameterization, sdxl, kind),
        "implementation": _implementation(sdxl, lora, textual_inversion, is_stable_diffusion_ckpt),
        "title": title if title is not None else f"{_DEFAULT_TITLES[kind]}@{timestamp}",
        "resolution": "x".join(str(side) for side in _resolution(reso, v2, v_parameterization, sdxl)),
        "description": description,
        "author": author,
        # Local time without zone or fraction is what readers of these files have always got.
        "date": datetime.datetime.fromtimestamp(int(timestamp)).isoformat(),
        "license": license,
        "tags": tags,
        "merged_from": merged_from,
        "prediction_type": PRED_TYPE_V if v_parameterization else PRED_TYPE_EPSILON,
        "timestep_range": _timestep_range(timesteps),
        "encoder_layer": None if clip_skip is None else str(clip_skip),
    }
    order = _ORDER_1_0_0 if version == "1.0.0" else _ORDER_1_0_1
    result = {f"modelspec.{name}": values[name] for name in order if values[name] is not None}
    result |= additional
    if version != "1.0.0":
        result.setdefault("modelspec.implementation_version", IMPLEMENTATION_VERSION)
    return result


_DEFAULT_TITLES = {"checkpoint": "Checkpoint", "lora": "LoRA", "textual_inversion": "TextualInversion"}


def architecture(v2: bool, v_parameterization: bool, sdxl: bool, kind: Kind = "checkpoint") -> str:
    """`modelspec.architecture`."""
    if sdxl:
        base = ARCH_SD_XL_V1_BASE
    elif v2:
        base = ARCH_SD_V2_768_V if v_parameterization else ARCH_SD_V2_512
    else:
        base = ARCH_SD_V1
    suffix = {"lora": f"/{ADAPTER_LORA}", "textual_inversion": f"/{ADAPTER_TEXTUAL_INVERSION}"}
    return base + suffix.get(kind, "")


def _implementation(sdxl: bool, lora: bool, textual_inversion: bool, is_stability: bool | None) -> str:
    if is_stability is None:
        is_stability = not lora
    return IMPL_STABILITY_AI if (lora and sdxl) or textual_inversion or is_stability else IMPL_DIFFUSERS


def _resolution(reso: Any, v2: bool, v_parameterization: bool, sdxl: bool) -> tuple[int, int]:
    if reso is None:
        side = 1024 if sdxl else 768 if v2 and v_parameterization else 512
        return side, side
    if isinstance(reso, str):
        reso = [int(side) for side in reso.split(",")]
    if isinstance(reso, int):
        return reso, reso
    sides = [int(side) for side in reso]
    return sides[0], sides[1 if len(sides) > 1 else 0]


def _timestep_range(timesteps: Any) -> str | None:
    if timesteps is None:
        return None
    if isinstance(timesteps, str | int):
        timesteps = (timesteps, timesteps)
    parts = list(timesteps)
    return f"{parts[0]},{parts[1 if len(parts) > 1 else 0]}"


def _additional(values: Mapping[str, Any]) -> dict[str, str]:
    result = {}
    for name, value in values.items():
        if value is None:
            continue
        key = name if name.startswith("modelspec.") else f"modelspec.{name}"
        text = thumbnail_text(str(value)) if key == "modelspec.thumbnail" else str(value)
        if text is not None:
            result[key] = text
    return result


def thumbnail_text(value: str) -> str | None:
    """A thumbnail as a data URL; a file is packed into one. None, with a warning, when it cannot be read."""
    if value.startswith("data:"):
        return value
    try:
        content = Path(value).read_bytes()
    except OSError:
        log.warning(f"the thumbnail {value} cannot be read; it is left out of the metadata")
        return None
    kind = mimetypes.guess_type(value)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def metadata_of_run(
    config: MetadataConfig,
    *,
    kind: Kind,
    v2: bool,
    v_parameterization: bool,
    sdxl: bool,
    timestamp: float,
    output_name: str | None = None,
    resolution: Any = None,
    min_timestep: int | None = None,
    max_timestep: int | None = None,
    clip_skip: int | None = None,
    is_stability_layout: bool | None = None,
) -> dict[str, str]:
    """The `modelspec.*` texts of what a training run writes.

    Args:
        config: the user's texts.
        output_name: title when the user gives none.
        resolution: of the training; None takes the family's own.
        min_timestep, max_timestep: as given; the range is written when either is.
        is_stability_layout: checkpoints only.
    """
    extra = {name: getattr(config, f"metadata_{name}") for name in _OPTIONAL}
    timesteps = None
    if min_timestep is not None or max_timestep is not None:
        timesteps = (0 if min_timestep is None else min_timestep, 1000 if max_timestep is None else max_timestep)
    return build_metadata(
        None,
        v2,
        v_parameterization,
        sdxl,
        kind == "lora",
        kind == "textual_inversion",
        timestamp,
        title=config.metadata_title if config.metadata_title is not None else output_name,
        reso=resolution,
        is_stable_diffusion_ckpt=is_stability_layout,
        author=config.metadata_author,
        description=config.metadata_description,
        license=config.metadata_license,
        tags=config.metadata_tags,
        timesteps=timesteps,
        clip_skip=clip_skip,
        optional_metadata=extra,
    )


_OPTIONAL = ("usage_hint", "thumbnail", "merged_from", "trigger_phrase", "preprocessor", "is_negative_embedding")


def build_merged_from(models: Sequence[str | Path]) -> str:
    """Titles of the files that were merged, joined with `, `."""
    return ", ".join(_title_of(Path(model)) for model in models)


def _title_of(model: Path) -> str:
    metadata = load_metadata_from_safetensors(model)
    title = get_title(metadata) if metadata else None
    return title if title is not None else model.stem


def get_title(metadata: Mapping[str, str]) -> str | None:
    """`modelspec.title`, None without one."""
    return metadata.get(MODELSPEC_TITLE)


def load_metadata_from_safetensors(model: str | Path) -> dict[str, str]:
    """Header texts of a file whose name ends in `.safetensors` (this case only); else an empty dictionary."""
    return read_metadata(model) if str(model).endswith(".safetensors") else {}
