"""Making LoRA-like networks from `--network_args` (networks.md 2.3) and from files; the network's class is given."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from library.messages import UserError, warn_once
from networks import diffusers_format, files, names, reading
from networks.blocks import all_weights, block_ranks, layout_of, weights_from_arguments

DEFAULT_DIM = 4
DEFAULT_ALPHA = 1.0
BLOCK_RATE_ARGUMENTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")
LORAPLUS_ARGUMENTS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
ARGUMENTS = (
    "conv_dim",
    "conv_alpha",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    *BLOCK_RATE_ARGUMENTS,
    "rank_dropout",
    "module_dropout",
    *LORAPLUS_ARGUMENTS,
)

Network = TypeVar("Network", bound=Any)


def create(
    network_class: type[Network],
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None,
    kwargs: Mapping[str, Any],
) -> Network:
    """A new network for training.

    Args:
        network_class: `LoRANetwork` or a class with its constructor.
        multiplier: strength, 1 in training.
        network_dim, network_alpha: rank (None = 4) and alpha (None = 1) of linear layers and 1x1 convolutions.
        text_encoder: one model or a list.
        neuron_dropout: chance to drop a hidden value.
        kwargs: `--network_args` as texts (networks.md 2.3).

    Raises:
        UserError: a value that is no number, or lists of the wrong length.
    """
    warn_unknown(kwargs, ARGUMENTS, f"in {network_class.__module__}")
    dim = DEFAULT_DIM if network_dim is None else int(network_dim)
    alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
    conv_dim = number(kwargs, "conv_dim", int)
    conv_alpha = number(kwargs, "conv_alpha", float)
    if conv_dim is not None and conv_alpha is None:
        conv_alpha = 1.0

    layout = layout_of(names.unet_names(unet))
    rates = all_weights(layout, *weights_from_arguments(layout, kwargs))
    ranks = None
    if kwargs.get("block_dims") is not None or rates is not None:
        dims, alphas, conv_dims, conv_alphas = (
            kwargs.get(key) for key in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
        )
        ranks = block_ranks(layout, dims, alphas, dim, alpha, conv_dims, conv_alphas, conv_dim, conv_alpha)
        ranks.remove_zero_blocks(rates)

    network = network_class(
        text_encoder,
        unet,
        multiplier=multiplier,
        lora_dim=dim,
        alpha=alpha,
        dropout=neuron_dropout,
        rank_dropout=number(kwargs, "rank_dropout", float),
        module_dropout=number(kwargs, "module_dropout", float),
        conv_lora_dim=conv_dim,
        conv_alpha=conv_alpha,
        block_dims=ranks and ranks.dims,
        block_alphas=ranks and ranks.alphas,
        conv_block_dims=ranks and ranks.conv_dims,
        conv_block_alphas=ranks and ranks.conv_alphas,
        module_class=network_class.MODULE_CLASS,
        varbose=True,
    )
    if rates is not None:
        network.set_block_lr_weight(rates)
    set_loraplus(network, kwargs)
    return network


def create_from_weights(
    network_class: type[Network],
    multiplier: float,
    file: str | None,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None,
    for_inference: bool,
    kwargs: Mapping[str, Any],
) -> tuple[Network, dict[str, Tensor]]:
    """A network with the ranks and alphas of a file; its values are for the caller to load or merge.

    Args:
        file: the network file; read unless `weights_sd` holds its tensors.
        for_inference: modules for generation (`LoRAInfModule`).
        kwargs: of these only block learning-rate weights and LoRA+ ratios are used; others get a warning.

    Returns:
        The network, and the file's tensors under the network's names.

    Raises:
        UserError: the file is of another family or method.
    """
    weights, source = read(file, weights_sd, unet)
    warn_unknown(kwargs, (*BLOCK_RATE_ARGUMENTS, *LORAPLUS_ARGUMENTS), "with the ranks of a file")
    dims, alphas = ranks_and_alphas(weights)
    network = network_class(
        text_encoder,
        unet,
        multiplier=multiplier,
        modules_dim=dims,
        modules_alpha=alphas,
        module_class=network_class.INFERENCE_CLASS if for_inference else network_class.MODULE_CLASS,
    )
    files.check_match(weights, network.adapters, source)
    rates = all_weights(network.layout, *weights_from_arguments(network.layout, kwargs))
    if rates is not None:
        network.set_block_lr_weight(rates)
    set_loraplus(network, kwargs)
    return network, weights


def read(file: str | None, weights_sd: Mapping[str, Tensor] | None, unet: nn.Module) -> tuple[dict[str, Tensor], str]:
    """A plain LoRA file's tensors under the names of this U-Net, and what to call the file in messages."""
    source = str(file) if file is not None else "the network"
    weights = dict(weights_sd) if weights_sd is not None else reading.read_network(str(file))
    if diffusers_format.is_diffusers(weights):
        weights = diffusers_format.to_kohya(weights)
    files.refuse_foreign_methods(weights, source)
    return names.convert_if_needed(weights, names.unet_names(unet)), source


def set_loraplus(network: Any, kwargs: Mapping[str, Any]) -> None:
    """Hand the LoRA+ ratios of the arguments to a network."""
    network.set_loraplus_lr_ratio(*(number(kwargs, key, float) for key in LORAPLUS_ARGUMENTS))


def ranks_and_alphas(weights: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, Any]]:
    """Rank and alpha by module name; a missing alpha is the rank."""
    dims: dict[str, int] = {}
    alphas: dict[str, Any] = {}
    for name, tensors in files.group_by_module(weights).items():
        for key, tensor in tensors.items():
            if "alpha" in key:
                alphas[name] = tensor
            elif "lora_down" in key:
                dims[name] = tensor.shape[0]
    return dims, {name: alphas.get(name, dim) for name, dim in dims.items()}


def warn_unknown(kwargs: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Arguments that do nothing are named, with what was perhaps meant (`dropout` comes from the trainer itself)."""
    for key in sorted(kwargs.keys() - {*known, "dropout"}):
        near = difflib.get_close_matches(key, known, 1)
        warn_once(f"network argument {key} has no effect {where}" + (f"; did you mean {near[0]}?" if near else ""))


def number(kwargs: Mapping[str, Any], key: str, kind: type) -> Any:
    """An argument as a number, None when not given."""
    value = kwargs.get(key)
    try:
        return None if value is None else kind(value)
    except (TypeError, ValueError):
        raise UserError(f"network argument {key}={value} is not a number", "give a number") from None
