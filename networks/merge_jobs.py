"""What the merge scripts do with their options: open, merge, describe, write, tell the error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from library.messages import UserError, log
from library.models.checkpoint import is_safetensors_name
from library.models.family import family
from library.options.network_tools import NetworkMergeConfig
from library.runtime.devices import pick_device
from networks import files, merging
from networks.block_weights import parse_block_weights
from networks.tool_files import (
    PRECISIONS,
    SDXL,
    NetworkFile,
    base_facts,
    check_ratios,
    dtype_of,
    modelspec,
    open_networks,
    say_error,
)
from networks.tool_functions import (
    merge_opened,
    merged_metadata,
    open_sdxl_networks,
    refuse_oft_with_oft,
    svd_metadata,
)

SQUARED = "the weighted sum of the networks (this merge squares ratios and mixes networks; svd_merge_lora.py does not)"
CHANGE = "the change that the networks make"


def merge_sd(options: NetworkMergeConfig) -> None:
    """`merge_lora.py`."""
    models, ratios = check_ratios(options.models, options.ratios)
    opened = open_networks(models)
    if options.sd_model is not None:
        merging.refuse_sdxl(opened)
        _into_model(options, "sd", opened, ratios)
    else:
        _together(options, opened, ratios, sdxl=any(file.kind == SDXL for file in opened))


def merge_sdxl(options: NetworkMergeConfig) -> None:
    """`sdxl_merge_lora.py`."""
    models, ratios = check_ratios(options.models, options.ratios)
    opened = open_sdxl_networks(models)
    if options.sd_model is not None:
        _into_model(options, "sdxl", opened, ratios)
        return
    try:
        refuse_oft_with_oft(opened)
    except ValueError as error:
        raise UserError(str(error), "give --sd_model") from None
    _together(options, opened, ratios, sdxl=True)


def merge_old(options: NetworkMergeConfig) -> None:
    """`merge_lora_old.py`."""
    models, ratios = check_ratios(options.models, options.ratios)
    opened = open_networks(models)
    if options.sd_model is not None:
        merging.refuse_sdxl(opened)
        _into_model(options, "sd", opened, ratios, linear_only=True)
        return
    dtype, store = _dtypes(options)
    merged = merging.merge_plain(opened, ratios, dtype, store)
    files.write_weights(merged.state, _target(options), store, None)
    _say_saved(options)
    say_error(merged.error.relative, SQUARED)


def merge_by_svd(options: NetworkMergeConfig) -> None:
    """`svd_merge_lora.py`."""
    models, ratios = check_ratios(options.models, options.ratios)
    opened = open_networks(models)
    dtype, store = _dtypes(options)
    conv_rank = options.new_rank if options.new_conv_rank is None else options.new_conv_rank
    merged = merging.svd_merge(
        opened,
        ratios,
        dtype,
        options.new_rank,
        conv_rank,
        pick_device(options.device),
        block_weights=_block_weights(options, opened),
        store_dtype=store,
    )
    metadata = svd_metadata(opened, options.new_rank, conv_rank)
    v2, base = base_facts(opened)
    sdxl = (base or "").lower().startswith("sdxl") or any(file.kind == SDXL for file in opened)
    if not options.no_metadata:
        metadata |= modelspec(_target(options), models, v2=bool(v2), v_parameterization=bool(v2), sdxl=sdxl)
    files.write_weights(merged.state, _target(options), store, metadata)
    _say_saved(options)
    say_error(merged.error.relative, "the weighted sum of the networks")


def _together(options: NetworkMergeConfig, opened: Sequence[NetworkFile], ratios: Sequence[float], sdxl: bool) -> None:
    dtype, store = _dtypes(options)
    merged = merging.merge_networks(
        opened,
        ratios,
        dtype,
        concat=options.concat,
        shuffle=options.shuffle,
        block_weights=_block_weights(options, opened),
        store_dtype=store,
    )
    metadata = merged_metadata(opened, merged)
    if not options.no_metadata:
        v2 = bool(base_facts(opened)[0]) and not sdxl
        sources = [str(file.path) for file in opened]
        metadata |= modelspec(_target(options), sources, v2=v2, v_parameterization=v2, sdxl=sdxl)
    files.write_weights(merged.state, _target(options), store, metadata)
    _say_saved(options)
    say_error(merged.error.relative, SQUARED)


def _into_model(
    options: NetworkMergeConfig,
    family_name: str,
    opened: Sequence[NetworkFile],
    ratios: Sequence[float],
    *,
    linear_only: bool = False,
) -> None:
    dtype, store = _dtypes(options)
    assert options.sd_model is not None
    if options.v2:
        log.info("SD 2.x: the model is taken for one that predicts velocity")
    model = family(family_name).load(options.sd_model, v2=options.v2, v_parameterization=True if options.v2 else None)
    for module in (*model.text_encoders, model.unet):
        module.to(dtype)
    error = merge_opened(
        model.text_encoders,
        model.unet,
        opened,
        ratios,
        linear_only=linear_only,
        block_weights=_block_weights(options, opened),
        store_dtype=store,
    )
    metadata = None
    if not options.no_metadata and not linear_only:
        metadata = modelspec(
            _target(options),
            [options.sd_model, *(str(file.path) for file in opened)],
            v2=options.v2,
            v_parameterization=model.prediction_type == "v_prediction",
            sdxl=family_name == "sdxl",
            network=False,
        )
    # the merged model counts from zero
    model.extras |= {"source_epoch": None, "source_step": None}
    family(family_name).save(
        model,
        _target(options),
        stability_layout=True,
        safetensors=is_safetensors_name(_target(options)),
        dtype=store,
        metadata=metadata,
    )
    _say_saved(options)
    say_error(error.relative, CHANGE)


def _dtypes(options: NetworkMergeConfig) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the merge, dtype of the file)."""
    dtype = PRECISIONS[options.precision]
    return dtype, dtype_of(options.save_precision) or dtype


def _target(options: NetworkMergeConfig) -> str:
    assert options.save_to is not None
    return options.save_to


def _block_weights(options: NetworkMergeConfig, opened: Sequence[NetworkFile]) -> merging.BlockWeights | None:
    return parse_block_weights(options.lbws, len(opened)) if options.lbws else None


def _say_saved(options: NetworkMergeConfig) -> None:
    log.info("saved %s", options.save_to)
