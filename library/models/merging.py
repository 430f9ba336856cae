"""Weighted sums of model files, tensor by tensor: never more than one tensor of each file in memory."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.messages import UserError, log
from library.models.checkpoint import Checkpoint, SafetensorsCheckpoint, open_checkpoint
from library.models.checkpoint_writer import Pending, write_safetensors
from library.models.dimensions import kind_of
from library.models.key_maps import CLIP_PREFIX
from library.models.loading import told_by_file
from library.models.modelspec import build_merged_from, build_metadata
from library.models.saving import HASH_KEY
from library.models.text_encoders import exchanged_key
from library.options.model_tools import ModelMergeConfig

PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NOT_UNET = ("first_stage_model", "cond_stage_model", "conditioner.")
# Text by which the A1111 web UI, too, tells how a model was merged.
RECIPE_KEY = "sd_merge_recipe"


@dataclass(frozen=True)
class Source:
    """One of the models: its file, its share, and today's name -> name in the file."""

    checkpoint: Checkpoint
    ratio: float
    names: dict[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[self.names[name]].shape

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        own = self.names[name]
        return self.checkpoint.read([own], device=device)[own]


def merge_files(options: ModelMergeConfig) -> Path:
    """`merge_models.py`; returns the file that was written.

    Raises:
        UserError: no models or no output, a wrong number of ratios, a file that is missing or no safetensors file,
            tensors of different shapes.
    """
    if not options.output:
        raise UserError("--output is missing", "give the file to write")
    ratios = checked_ratios(options.models, options.ratios)
    sources = [open_source(path, ratio) for path, ratio in zip(options.models or (), ratios, strict=True)]
    items = weighted_sum(
        sources,
        unet_only=options.unet_only,
        device=options.device,
        precision=PRECISIONS[options.precision],
        dtype=PRECISIONS[options.saving_precision],
    )
    tell_differences(sources, unet_only=options.unet_only, show_skipped=options.show_skipped)
    output = output_path(options.output)
    count = write_safetensors(output, items, merged_metadata(sources, output, options.unet_only), HASH_KEY)
    log.info("%s: %d tensors merged from %d models", output, count, len(sources))
    return output


def checked_ratios(models: Sequence[str] | None, ratios: Sequence[float] | None) -> list[float]:
    """One number for each model; equal shares when there are none.

    Raises:
        UserError: no models, another number of ratios, or a ratio that is no finite number.
    """
    if not models:
        raise UserError("--models is missing", "give the files to merge")
    if ratios is None:
        return [1.0 / len(models)] * len(models)
    if len(ratios) != len(models):
        raise UserError(f"{len(models)} --models but {len(ratios)} --ratios", "give one ratio for each model")
    if not all(math.isfinite(ratio) for ratio in ratios):
        raise UserError(f"--ratios {' '.join(map(str, ratios))} are no finite numbers", "give numbers like 0.7 0.3")
    if abs(sum(ratios) - 1) > 1e-3:
        log.warning("the ratios add up to %g, not 1: weights become larger or smaller as a whole", sum(ratios))
    return list(ratios)


def output_path(name: str) -> Path:
    """`.safetensors` is appended to any other name."""
    return Path(name if name.endswith(".safetensors") else name + ".safetensors")


def open_source(path: str | Path, ratio: float) -> Source:
    """One model by its header.

    Raises:
        UserError: not there, broken, or no safetensors file.
    """
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise UserError(
            f"{path} is no safetensors file", "convert it with tools/convert_diffusers20_original_sd.py first"
        )
    return Source(checkpoint, ratio, {current_name(name): name for name in checkpoint.tensors})


def current_name(name: str) -> str:
    """The oldest SD 1.x files leave out the level `text_model` of the text encoder."""
    return CLIP_PREFIX + exchanged_key(name[len(CLIP_PREFIX) :]) if name.startswith(CLIP_PREFIX) else name


def is_unet(name: str) -> bool:
    """Whether `unet_only` merges a tensor."""
    return not any(word in name for word in NOT_UNET)


def weighted_sum(
    sources: Sequence[Source],
    *,
    unet_only: bool = False,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> list[Pending]:
    """The tensors of the merged model, each computed when its turn to be written comes.

    The first model says which tensors there are. Where a later one lacks a tensor, the first model's value stands in
    for it. Tensors that are no floating numbers are the first model's.

    Args:
        unet_only: the rest is the first model's.
        device, precision: where and in what number format tensors are added up.
        dtype: of the result.

    Raises:
        UserError: a tensor has different shapes (it is named).
    """
    first = sources[0]
    items = []
    for name, own in first.names.items():
        info = first.checkpoint.tensors[own]
        if not info.dtype.is_floating_point:
            items.append(Pending(name, info.dtype, info.shape, lambda n=name: first.read(n)))
            continue
        merged = [source for source in sources[1:] if name in source.names]
        if unet_only and not is_unet(name):
            merged = None
        else:
            _refuse_other_shapes(name, first, merged)
        items.append(Pending(name, dtype, info.shape, _sum_of(name, sources, merged, device, precision)))
    return items


def _sum_of(
    name: str,
    sources: Sequence[Source],
    merged: Sequence[Source] | None,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Callable[[], Tensor]:
    """Computes one tensor; `merged` are the later models that have it, None for a copy of the first model's."""

    def make() -> Tensor:
        value = sources[0].read(name, device).to(dtype)
        if merged is None:
            return value
        total = sources[0].ratio * value
        for source in merged:
            total += source.ratio * source.read(name, device).to(dtype)
        missing = sum(source.ratio for source in sources[1:] if source not in merged)
        return total + missing * value if missing else total

    return make


def _refuse_other_shapes(name: str, first: Source, others: Sequence[Source]) -> None:
    for other in others:
        if other.shape(name) != first.shape(name):
            raise UserError(
                f"{name} is {list(first.shape(name))} in {first.checkpoint.path} and {list(other.shape(name))} in"
                f" {other.checkpoint.path}",
                "merge models of one family",
            )


def tell_differences(sources: Sequence[Source], *, unet_only: bool = False, show_skipped: bool = False) -> None:
    """Say which tensors a later model lacks, and with `show_skipped` which it has beyond the first model's."""
    first = sources[0]
    for source in sources[1:]:
        path = source.checkpoint.path
        for name in first.names:
            if name not in source.names and not (unet_only and not is_unet(name)):
                log.warning("%s lacks %s: the first model's counts instead", path, name)
        for name in source.names if show_skipped else ():
            if name not in first.names:
                log.info("%s: %s is left out, the first model lacks it", path, name)


def merged_metadata(sources: Sequence[Source], output: Path, unet_only: bool = False) -> dict[str, str]:
    """The first model's ModelSpec texts under a new title and date, the titles of all models, and the recipe."""
    first = sources[0].checkpoint
    paths = [source.checkpoint.path for source in sources]
    merged_from = build_merged_from(paths)
    texts = {k: v for k, v in first.metadata.items() if k.startswith("modelspec.") and k != HASH_KEY}
    texts = _spec_of(first, merged_from) | texts
    texts["modelspec.title"] = output.stem
    texts["modelspec.date"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    texts["modelspec.merged_from"] = merged_from
    recipe = {
        "type": "weighted sum",
        "models": [path.name for path in paths],
        "ratios": [source.ratio for source in sources],
        "unet_only": unet_only,
    }
    return texts | {RECIPE_KEY: json.dumps(recipe)}


def _spec_of(checkpoint: Checkpoint, merged_from: str) -> dict[str, str]:
    """ModelSpec texts by what a model's tensors say; none for a file of no known family."""
    try:
        kind = kind_of({name: info.shape for name, info in checkpoint.tensors.items()})
    except UserError:
        return {}
    told = told_by_file(checkpoint).prediction_type
    is_v = told == "v_prediction" or (told is None and kind == "sd2")
    return build_metadata(
        None, kind == "sd2", is_v, kind == "sdxl", False, False, time.time(), title="", merged_from=merged_from
    )
