"""A network made of what a tuned model has over its original: the best low-rank update of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.messages import UserError, log, progress
from library.models.family import LoadedModel, family
from library.options.network_tools import NetworkExtractConfig
from library.runtime.devices import pick_device
from networks import algebra, files
from networks.merging import ALL_TARGETS, LINEAR_TARGETS, layers_by_name
from networks.tool_files import dtype_of, minimum_metadata, modelspec, say_error


@dataclass
class Extracted:
    """The network's tensors, and their distance from the models' difference."""

    state: dict[str, Tensor] = field(default_factory=dict)
    error: algebra.Error = field(default_factory=algebra.Error)


def layers_of(model: LoadedModel, with_convs: bool) -> dict[str, Any]:
    """Name in network files -> layer, of the layers that a network of this kind has."""
    layers = layers_by_name(model.text_encoders, model.unet, ALL_TARGETS if with_convs else LINEAR_TARGETS)
    if with_convs:
        return layers
    return {name: layer for name, layer in layers.items() if layer.weight.shape[2:] in ((), (1, 1))}


def weights_of(model: LoadedModel, with_convs: bool) -> dict[str, Tensor]:
    """Name -> weight in the shape that the network's file has it (SD 2.x: projections as 1x1 convolutions)."""
    weights = {}
    for name, layer in layers_of(model, with_convs).items():
        weight = layer.weight.detach()
        weights[name] = weight[:, :, None, None] if getattr(layer, "conv_in_files", False) else weight
    return weights


def extract(
    original: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    dim: int,
    conv_dim: int | None,
    device: torch.device,
    min_diff: float,
    clamp_quantile: float,
    dtype: torch.dtype,
) -> Extracted:
    """A network of the difference of two models' weights.

    Args:
        original, tuned: name -> weight, of `weights_of`.
        min_diff: text encoders that nowhere differ by more get no modules.
        dtype: of the file.

    Raises:
        UserError: the models have different layers.
    """
    if original.keys() != tuned.keys():
        only = sorted(original.keys() ^ tuned.keys())
        raise UserError(f"the models have different layers, e.g. {only[0]}", "give two models of one family")
    names = list(original)
    if not _text_differs(original, tuned, min_diff):
        log.info("the text encoders differ nowhere by more than %g: the network has no part for them", min_diff)
        names = [name for name in names if not name.startswith("lora_te")]
    result = Extracted()
    for name in progress(names, "extracting modules"):
        if original[name].shape != tuned[name].shape:
            sizes = f"{tuple(original[name].shape)} and {tuple(tuned[name].shape)}"
            raise UserError(f"the models differ in size at {name}: {sizes}", "give two models of one family")
        difference = tuned[name].to(device, torch.float32) - original[name].to(device, torch.float32)
        _add_module(result, name, difference, dim, conv_dim, clamp_quantile, dtype)
    return result


def _text_differs(original: Mapping[str, Tensor], tuned: Mapping[str, Tensor], min_diff: float) -> bool:
    text = [name for name in original if name.startswith("lora_te")]
    return any(
        original[name].shape != tuned[name].shape
        or (tuned[name].float() - original[name].float()).abs().max() > min_diff
        for name in text
    )


def _add_module(
    result: Extracted,
    name: str,
    difference: Tensor,
    dim: int,
    conv_dim: int | None,
    clamp_quantile: float,
    dtype: torch.dtype,
) -> None:
    is_conv = difference.dim() == 4 and tuple(difference.shape[2:]) != (1, 1)
    m = algebra.matrix(difference)
    rank = min(conv_dim if is_conv and conv_dim is not None else dim, *m.shape)
    up, down = algebra.clamp(*algebra.decompose(m, rank).split(rank), clamp_quantile)
    up, down = up.to(dtype), down.to(dtype)
    result.error.add((up.float() @ down.float() - m).norm().item(), m.norm().item())
    up, down = up.cpu().contiguous(), down.cpu().contiguous()
    if difference.dim() == 4:
        up, down = up[:, :, None, None], down.view(rank, *difference.shape[1:])
    result.state[f"{name}.alpha"] = torch.tensor(float(rank)).to(dtype)
    result.state[f"{name}.lora_down.weight"], result.state[f"{name}.lora_up.weight"] = down, up


def extract_network(options: NetworkExtractConfig) -> None:
    """`extract_lora_from_models.py`: one model is held whole at a time, of the other only the layers' weights."""
    assert options.model_org is not None and options.model_tuned is not None and options.save_to is not None
    if options.v2 and options.sdxl:
        raise UserError("--v2 and --sdxl are both given", "leave one out")
    v_parameterization = options.v2 if options.v_parameterization is None else options.v_parameterization
    original, _ = _read_weights(options, options.model_org, options.load_original_model_to, v_parameterization)
    tuned, version = _read_weights(options, options.model_tuned, options.load_tuned_model_to, v_parameterization)
    dtype = dtype_of(options.save_precision) or torch.float32
    result = extract(
        original,
        tuned,
        dim=options.dim,
        conv_dim=options.conv_dim,
        device=pick_device(options.device),
        min_diff=options.min_diff,
        clamp_quantile=options.clamp_quantile,
        dtype=dtype,
    )
    convs = {} if options.conv_dim is None else {"conv_dim": options.conv_dim, "conv_alpha": options.conv_dim}
    metadata = minimum_metadata(options.v2, version, options.dim, options.dim, convs)
    if not options.no_metadata:
        metadata |= modelspec(
            options.save_to, [], v2=options.v2, v_parameterization=bool(v_parameterization), sdxl=options.sdxl
        )
    files.write_weights(result.state, options.save_to, dtype, metadata)
    log.info("saved %s", options.save_to)
    say_error(result.error.relative, "the difference of the models")


def _read_weights(
    options: NetworkExtractConfig, source: str, device: str | None, v_parameterization: bool
) -> tuple[dict[str, Tensor], str]:
    """The weights that the network may change, and the model's `ss_base_model_version`."""
    log.info("opening %s", source)
    try:
        model = family("sdxl" if options.sdxl else "sd").load(
            source,
            v2=options.v2,
            v_parameterization=v_parameterization,
            dtype=dtype_of(options.load_precision),
            device=device or "cpu",
        )
    except UserError as error:
        if "sdxl_" in error.remedy:
            raise UserError(error.problem, "give --sdxl") from None
        raise
    return weights_of(model, options.conv_dim is not None), model.version
