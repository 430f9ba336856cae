"""Functions of the merge, extract, resize and split tools under the names and arguments that other programs call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.messages import write
from library.models.checkpoint import open_checkpoint
from library.runtime.devices import pick_device
from networks import algebra, files, merging, resizing
from networks.block_weights import parse_block_weights
from networks.tool_files import (
    OFT,
    SD_KINDS,
    NetworkFile,
    base_facts,
    minimum_metadata,
    open_networks,
    refuse_kinds,
)

State = dict[str, Tensor]


def load_state_dict(file_name: str, dtype: torch.dtype | None) -> tuple[State, dict[str, str]]:
    """A file's tensors in a dtype (None = as they are) and its metadata."""
    checkpoint = open_checkpoint(file_name)
    return {key: value.to(dtype or value.dtype) for key, value in checkpoint.stream()}, dict(checkpoint.metadata)


def save_to_file(file_name: str, *parts: Any) -> None:
    """Write a network: (state, metadata), (state, dtype, metadata), (_, state, dtype) or (_, state, dtype, metadata).

    The forms are those of different tools and releases; they are told by their number and types.
    """
    dtype, metadata = None, None
    if len(parts) == 2:
        state, metadata = parts
    elif len(parts) == 3 and (parts[1] is None or isinstance(parts[1], torch.dtype)):
        state, dtype, metadata = parts
    else:
        state, dtype = parts[1:3]
        metadata = parts[3] if len(parts) > 3 else None
    files.write_weights(state, file_name, dtype, metadata)


# merge_lora


def merge_to_sd_model(
    text_encoder: nn.Module, unet: nn.Module, models: Sequence[str], ratios: Sequence[float], merge_dtype: torch.dtype
) -> None:
    """Merge LoRA files into the modules of an SD 1.x or 2.x model, which become `merge_dtype`."""
    opened = open_networks(models)
    merging.refuse_sdxl(opened)
    _into_modules([text_encoder], unet, opened, ratios, merge_dtype)


def merge_lora_models(
    models: Sequence[str],
    ratios: Sequence[float],
    merge_dtype: torch.dtype,
    concat: bool = False,
    shuffle: bool = False,
) -> tuple[State, dict[str, str], bool | None]:
    """LoRA files merged to one: tensors, minimum metadata, whether they are for SD 2.x (None = unknown)."""
    opened = open_networks(models)
    merged = merging.merge_networks(opened, ratios, merge_dtype, concat=concat, shuffle=shuffle)
    return merged.state, merged_metadata(opened, merged), base_facts(opened)[0]


def merged_metadata(opened: Sequence[NetworkFile], merged: merging.Merged) -> dict[str, str]:
    """The minimum metadata of a merge."""
    return minimum_metadata(*base_facts(opened), merged.dim, merged.alpha)


# merge_lora_old


def merge_to_sd_model_old(
    text_encoder: nn.Module, unet: nn.Module, models: Sequence[str], ratios: Sequence[float], merge_dtype: torch.dtype
) -> None:
    """The same for linear layers and 1x1 convolutions of attention blocks only."""
    opened = open_networks(models)
    merging.refuse_sdxl(opened)
    _into_modules([text_encoder], unet, opened, ratios, merge_dtype, linear_only=True)


def merge_lora_models_old(
    models: Sequence[str], ratios: Sequence[float], merge_dtype: torch.dtype
) -> tuple[State, float, float]:
    """LoRA files of equal alphas merged to one: tensors, rank and alpha of the last module."""
    merged = merging.merge_plain(open_networks(models), ratios, merge_dtype)
    return merged.state, list(merged.ranks.values())[-1], list(merged.alphas.values())[-1]


# sdxl_merge_lora


def merge_to_sdxl_model(
    text_encoder1: nn.Module,
    text_encoder2: nn.Module,
    unet: nn.Module,
    models: Sequence[str],
    ratios: Sequence[float],
    *rest: Any,
    **named: Any,
) -> None:
    """Merge LoRA or OFT files into the modules of an SDXL model: `..., merge_dtype` or `..., lbws, merge_dtype`."""
    lbws, (merge_dtype,) = _with_block_weights(rest, named, ("merge_dtype",))
    opened = open_sdxl_networks(models)
    _into_modules(
        [text_encoder1, text_encoder2],
        unet,
        opened,
        ratios,
        merge_dtype,
        block_weights=parse_block_weights(lbws, len(opened)),
    )


def merge_sdxl_lora_models(
    models: Sequence[str], ratios: Sequence[float], *rest: Any, **named: Any
) -> tuple[State, dict[str, str]]:
    """SDXL LoRA files merged to one: `merge_dtype, concat, shuffle`, with `lbws` before them in later releases."""
    lbws, (dtype, concat, shuffle) = _with_block_weights(
        rest, {"concat": False, "shuffle": False, **named}, ("merge_dtype", "concat", "shuffle")
    )
    opened = open_sdxl_networks(models)
    refuse_oft_with_oft(opened)
    weights = parse_block_weights(lbws, len(opened)) if lbws else None
    merged = merging.merge_networks(opened, ratios, dtype, concat=concat, shuffle=shuffle, block_weights=weights)
    return merged.state, merged_metadata(opened, merged)


def open_sdxl_networks(models: Sequence[str]) -> list[NetworkFile]:
    """Open files that are to be merged for SDXL, LoRA or OFT."""
    opened = open_networks(models, (OFT,))
    single = [file for file in opened if any(name.startswith("lora_te_") for name in file.pairs)]
    refuse_kinds([*single, *opened], SD_KINDS[:2], "use merge_lora.py")
    refuse_kinds(single, SD_KINDS, "use merge_lora.py")
    return opened


def refuse_oft_with_oft(opened: Sequence[NetworkFile]) -> None:
    """OFT networks have no sum."""
    if any(file.kind == OFT for file in opened):
        raise ValueError("OFT networks cannot be merged with each other, only into a model (--sd_model)")


# svd_merge_lora


def svd_merge_lora_models(
    models: Sequence[str], ratios: Sequence[float], *rest: Any, **named: Any
) -> tuple[State, dict[str, str], bool | None, str | None]:
    """LoRA files merged by their sum: `new_rank, new_conv_rank, device, merge_dtype`, later with `lbws` before them.

    Returns:
        Tensors, minimum metadata, whether they are for SD 2.x (None = unknown), `ss_base_model_version`.
    """
    names = ("new_rank", "new_conv_rank", "device", "merge_dtype")
    lbws, (new_rank, new_conv_rank, device, dtype) = _with_block_weights(rest, named, names)
    opened = open_networks(models)
    weights = parse_block_weights(lbws, len(opened)) if lbws else None
    merged = merging.svd_merge(
        opened, ratios, dtype, new_rank, new_conv_rank, pick_device(device or "cpu"), block_weights=weights
    )
    return merged.state, svd_metadata(opened, new_rank, new_conv_rank), *base_facts(opened)


def svd_metadata(opened: Sequence[NetworkFile], new_rank: int, new_conv_rank: int) -> dict[str, str]:
    """The minimum metadata of a merge by singular values."""
    arguments = {"conv_dim": new_conv_rank, "conv_alpha": new_conv_rank}
    return minimum_metadata(*base_facts(opened), new_rank, new_rank, arguments)


# resize_lora


def resize_lora_model(
    lora_sd: Mapping[str, Tensor], new_rank: int, *rest: Any, **named: Any
) -> tuple[State, int, float]:
    """Resize a network's tensors; later releases have `new_conv_rank` before the other arguments.

    Args:
        rest: save_dtype, device, dynamic_method, dynamic_param, verbose.

    Returns:
        Tensors, largest old rank, alpha of the last module.
    """
    names = ["save_dtype", "device", "dynamic_method", "dynamic_param", "verbose"]
    if "new_conv_rank" in named or (rest and not isinstance(rest[0], torch.dtype)):
        names.insert(0, "new_conv_rank")
    values = {**dict.fromkeys(names), **dict(zip(names, rest, strict=False)), **named}
    conv_rank = values.get("new_conv_rank")
    wanted = resizing.Wanted(
        new_rank, new_rank if conv_rank is None else conv_rank, values["dynamic_method"], values["dynamic_param"]
    )
    result = resizing.resize(
        list(lora_sd),
        lambda keys: {key: lora_sd[key] for key in keys},
        wanted,
        values["save_dtype"] or torch.float32,
        pick_device(values["device"] or "cpu"),
    )
    if values["verbose"]:
        write("\n".join(result.lines))
    return result.state, result.old_rank, result.new_alpha


def merge_linear(lora_down: Tensor, lora_up: Tensor, device: Any) -> Tensor:
    """The update of a linear layer: (out, in)."""
    return algebra.delta(lora_up.to(device), lora_down.to(device))


def merge_conv(lora_down: Tensor, lora_up: Tensor, device: Any) -> Tensor:
    """The update of a convolution: (out, in, kh, kw)."""
    return algebra.delta(lora_up.to(device), lora_down.to(device))


def extract_linear(
    weight: Tensor,
    lora_rank: int,
    dynamic_method: str | None,
    dynamic_param: float | None,
    device: Any,
    scale: float = 1,
) -> dict[str, Any]:
    """Factors `lora_up`, `lora_down` of a matrix at a new rank, with the numbers of `rank_resize`."""
    parts = algebra.decompose(algebra.matrix(weight.to(device)))
    facts: dict[str, Any] = algebra.rank_resize(parts.S, lora_rank, dynamic_method, dynamic_param, scale)
    up, down = parts.split(int(facts["new_rank"]))
    return {**facts, "lora_up": up.cpu().contiguous(), "lora_down": down.cpu().contiguous()}


def extract_conv(
    weight: Tensor,
    lora_rank: int,
    dynamic_method: str | None,
    dynamic_param: float | None,
    device: Any,
    scale: float = 1,
) -> dict[str, Any]:
    """The same for a convolution (out, in, kh, kw)."""
    result = extract_linear(weight.flatten(1), lora_rank, dynamic_method, dynamic_param, device, scale)
    result["lora_up"] = result["lora_up"][:, :, None, None]
    result["lora_down"] = result["lora_down"].view(-1, *weight.shape[1:])
    return result


# extract_lora_from_dylora


def split_lora_model(lora_sd: Mapping[str, Tensor], unit: int) -> tuple[int, list[tuple[int, State]]]:
    """A DyLoRA's rank, and (rank, tensors) of the networks of lower rank in it."""
    max_rank = resizing.max_rank_of({key: value.shape for key, value in lora_sd.items()})
    return max_rank, [(rank, algebra.first_ranks(lora_sd, rank)) for rank in resizing.split_ranks(max_rank, unit)]


def _into_modules(
    text_encoders: Sequence[nn.Module],
    unet: nn.Module,
    opened: Sequence[NetworkFile],
    ratios: Sequence[float],
    merge_dtype: torch.dtype,
    *,
    linear_only: bool = False,
    block_weights: merging.BlockWeights | None = None,
) -> None:
    for module in (*text_encoders, unet):
        module.to(merge_dtype)
    merge_opened(
        text_encoders,
        unet,
        opened,
        ratios,
        linear_only=linear_only,
        block_weights=block_weights,
    )


def merge_opened(
    text_encoders: Sequence[nn.Module],
    unet: nn.Module,
    opened: Sequence[NetworkFile],
    ratios: Sequence[float],
    *,
    linear_only: bool = False,
    block_weights: merging.BlockWeights | None = None,
    store_dtype: torch.dtype | None = None,
) -> algebra.Error:
    """Merge opened files into a model's modules; the distance of what is stored from the exact weights."""
    if opened[0].kind == OFT:
        layers = merging.layers_by_name([], unet, unet_prefix="oft_unet")
        for file in opened:
            error = merging.rotate_layers(layers, file, store_dtype=store_dtype)
        return error
    targets = merging.LINEAR_TARGETS if linear_only else merging.ALL_TARGETS
    layers = merging.layers_by_name(text_encoders, unet, targets)
    return merging.merge_into_layers(
        layers, opened, ratios, linear_only=linear_only, block_weights=block_weights, store_dtype=store_dtype
    )


def _with_block_weights(rest: Sequence[Any], named: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, list[Any]]:
    """(lbws, values of `names`) of a call in the old form, or in the later one that has `lbws` first.

    A list, or None, is never the first argument of the old form.
    """
    if rest and (rest[0] is None or isinstance(rest[0], (list, tuple))):
        named, rest = {"lbws": rest[0], **named}, rest[1:]
    values = {**dict(zip(names, rest, strict=False)), **named}
    missing = [name for name in names if name not in values]
    if missing:
        raise TypeError(f"missing arguments: {', '.join(missing)}")
    return values.get("lbws"), [values[name] for name in names]
