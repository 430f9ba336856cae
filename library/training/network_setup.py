"""Imports the network module and makes its network, as networks.md 1 says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from library.messages import UserError, log
from library.options.registries import NETWORKS, nearest

if TYPE_CHECKING:
    from library.models.family import LoadedModel
    from library.options.network import NetworkConfig


def import_network_module(name: str) -> ModuleType:
    """Import the module that `--network_module` names.

    Raises:
        UserError: no such module, or it lacks the functions of a network module.
    """
    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise UserError(
                f"--network_module {name} needs the package {error.name}", f"pip install {error.name}"
            ) from error
        near = nearest(name, [record.name for record in NETWORKS])
        hint = f"did you mean {near[0]}?" if near else "networks.lora is the plain LoRA"
        if name.startswith("lycoris"):
            hint = "pip install lycoris-lora"
        raise UserError(f"--network_module {name} cannot be found", hint) from error
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name} has no function create_network", "it is not a network module")
    return module


def parse_network_args(entries: Sequence[str] | None) -> dict[str, str]:
    """`key=value` entries, split at the first `=`; values stay strings."""
    result = {}
    for entry in entries or ():
        key, separator, value = entry.partition("=")
        if not separator:
            raise UserError(f"--network_args {entry}: there is no '='", "write key=value")
        result[key] = value
    return result


def encoders_argument(model: LoadedModel) -> Any:
    """One text encoder, or the list where the family has several."""
    return model.text_encoders if len(model.text_encoders) > 1 else model.text_encoders[0]


def merge_base_weights(
    module: ModuleType, config: NetworkConfig, model: LoadedModel, dtype: torch.dtype, device: Any
) -> None:
    """Merge the networks of `--base_weights` into the model before anything else is made of it."""
    multipliers = list(config.base_weights_multiplier or ())
    for index, path in enumerate(config.base_weights or ()):
        require_file(path, "--base_weights")
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        log.info("merging %s with multiplier %g", path, multiplier)
        encoders = encoders_argument(model)
        network, weights = module.create_network_from_weights(
            multiplier, path, model.vae, encoders, model.unet, for_inference=True
        )
        network.merge_to(encoders, model.unet, weights, dtype, device)


def make_network(module: ModuleType, config: NetworkConfig, model: LoadedModel) -> tuple[Any, dict[str, Any]]:
    """The network of a run, not yet applied.

    Returns:
        The network, and the arguments as they go into the metadata.
    """
    arguments: dict[str, Any] = dict(parse_network_args(config.network_args))
    encoders = encoders_argument(model)
    if config.dim_from_weights:
        require_file(config.network_weights or "", "--network_weights")
        network, _ = module.create_network_from_weights(
            1, config.network_weights, model.vae, encoders, model.unet, **arguments
        )
    else:
        arguments.setdefault("dropout", config.network_dropout)
        network = module.create_network(
            1.0,
            config.network_dim,
            config.network_alpha,
            model.vae,
            encoders,
            model.unet,
            neuron_dropout=config.network_dropout,
            **arguments,
        )
    if network is None:
        raise UserError(f"--network_module {config.network_module} made no network", "check --network_args")
    return network, arguments


def apply_network(
    network: Any, config: NetworkConfig, model: LoadedModel, *, trains_text: bool, trains_unet: bool
) -> None:
    """Hook the network into the model and load `--network_weights`."""
    network.apply_to(encoders_argument(model), model.unet, trains_text, trains_unet)
    if config.network_weights:
        require_file(config.network_weights, "--network_weights")
        info = network.load_weights(config.network_weights)
        log.info("loaded %s", config.network_weights)
        missing = [key for key in getattr(info, "missing_keys", ()) if not key.endswith(".alpha")]
        if missing:
            log.warning(
                "%d tensors of the network are not in it and start anew, the first is %s", len(missing), missing[0]
            )


def require_file(path: str, option: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"{option} {path}: there is no such file", "check the path")
