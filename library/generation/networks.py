"""Networks (LoRA and others) for pictures: loaded by import path, merged into the model or applied to it.

A network module is any importable Python module with `create_network_from_weights`; nothing here knows a method.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from library.messages import UserError, log
from library.models.family import LoadedModel


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """One network as the user names it: import path of its module, weights file, multiplier, arguments."""

    module: str
    weights: str
    multiplier: float = 1.0
    arguments: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AppliedNetwork:
    """A network that works beside the model's layers, and the multiplier it has unless a prompt says otherwise."""

    network: Any
    multiplier: float
    name: str


class Networks:
    """The networks that are applied (not merged), with their multipliers per batch.

    Args:
        applied: in the order of the command line.
        merged: what was merged into the model, for descriptions.
        pre_calculated: their weights are added to the model before each batch and taken back before the next one.
    """

    def __init__(
        self,
        applied: Sequence[AppliedNetwork] = (),
        *,
        merged: Sequence[NetworkSpec] = (),
        pre_calculated: bool = False,
    ) -> None:
        self.applied = list(applied)
        self.merged = list(merged)
        self.pre_calculated = pre_calculated

    def multipliers(self, given: Sequence[float] | None) -> list[float]:
        """One multiplier per applied network; a given list that is too short goes on with its last value."""
        if not given:
            return [one.multiplier for one in self.applied]
        return [given[min(index, len(given) - 1)] for index in range(len(self.applied))]

    def prepare_batch(self, given: Sequence[float] | None) -> None:
        """Set the multipliers of a batch."""
        for one, multiplier in zip(self.applied, self.multipliers(given), strict=True):
            one.network.set_multiplier(multiplier)
        if self.pre_calculated:
            for one in self.applied:
                one.network.restore_weights()
            for one in self.applied:
                one.network.pre_calculation()

    def description(self, given: Sequence[float] | None) -> str:
        """Names and multipliers of all networks of a picture: `style:0.8, face:1.0`."""
        merged = [f"{Path(spec.weights).stem}:{spec.multiplier}" for spec in self.merged]
        multipliers = self.multipliers(given)
        applied = [f"{one.name}:{value}" for one, value in zip(self.applied, multipliers, strict=True)]
        return ", ".join([*merged, *applied])


def network_specs(
    modules: Sequence[str] | None,
    weights: Sequence[str] | None,
    multipliers: Sequence[float] | None,
    arguments: Sequence[str] | None,
) -> list[NetworkSpec]:
    """The command line's lists -> one record per module; missing multipliers are 1, missing arguments empty.

    Raises:
        UserError: a module without weights, an argument without `=`.
    """
    modules, weights = modules or [], weights or []
    if len(weights) < len(modules):
        raise UserError(
            f"{len(modules)} network modules but {len(weights)} weights files", "give --network_weights a file for each"
        )
    if len(weights) > len(modules):
        ignored = ", ".join(weights[len(modules) :])
        log.warning(f"no effect: {ignored} (--network_weights has more values than --network_module)")
    specs = []
    for index, (module, file) in enumerate(zip(modules, weights, strict=False)):
        multiplier = multipliers[index] if multipliers and index < len(multipliers) else 1.0
        given = arguments[index] if arguments and index < len(arguments) else ""
        specs.append(NetworkSpec(module, file, multiplier, _arguments(given)))
    return specs


def _arguments(text: str) -> dict[str, str]:
    parts = [part for part in text.split(";") if part.strip()]
    for part in parts:
        if "=" not in part:
            raise UserError(f"--network_args {part!r} is not key=value", "write key=value;key=value")
    return dict(part.split("=", 1) for part in parts)


def load_networks(
    specs: Sequence[NetworkSpec],
    model: LoadedModel,
    *,
    merge_first: int = 0,
    pre_calculate: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Networks:
    """Load networks for drawing: merge the first `merge_first` of them into the model, apply the others to it.

    A network that cannot be merged is applied, with a message. Weights are backed up after every merge is done.

    Raises:
        UserError: module or file not there, or a network that lacks what was asked for.
    """
    applied, merged = [], []
    for index, spec in enumerate(specs):
        network, weights = _create(spec, model)
        if index < merge_first and _is_mergeable(network, spec):
            network.merge_to(_encoders(model), model.unet, weights, dtype, device)
            merged.append(spec)
            log.info(f"network merged: {spec.weights}, multiplier {spec.multiplier}")
            continue
        _apply(network, weights, model, spec.weights, device=device, dtype=dtype, channels_last=channels_last)
        applied.append(AppliedNetwork(network, spec.multiplier, Path(spec.weights).stem))
        log.info(f"network applied: {spec.weights}, multiplier {spec.multiplier}")
    if pre_calculate:
        for one in applied:
            if not hasattr(one.network, "backup_weights"):
                raise UserError(f"network {one.name} cannot be pre-calculated", "leave out --network_pre_calc")
            one.network.backup_weights()
    return Networks(applied, merged=merged, pre_calculated=pre_calculate)


def check_networks(specs: Sequence[NetworkSpec]) -> None:
    """Refuse modules and files that are not there, before a model is opened.

    Raises:
        UserError: the first one.
    """
    for spec in specs:
        _module(spec.module)
        if not Path(spec.weights).is_file():
            raise UserError(f"network weights {spec.weights} not found", "check --network_weights")


def show_metadata(specs: Sequence[NetworkSpec]) -> None:
    """Say the metadata of each weights file that can hold some."""
    from safetensors import safe_open

    for spec in specs:
        if not spec.weights.endswith(".safetensors"):
            log.info(f"metadata of {spec.weights}: none (only .safetensors files hold metadata)")
            continue
        with safe_open(spec.weights, framework="pt") as file:
            metadata = file.metadata() or {}
        lines = [f"  {key}: {value}" for key, value in sorted(metadata.items())]
        log.info("\n".join([f"metadata of {spec.weights}:", *lines]))


def _module(path: str) -> ModuleType:
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise UserError(f"network module {path!r} cannot be imported ({error})", "check --network_module") from error
    if not hasattr(module, "create_network_from_weights"):
        raise UserError(f"{path!r} is not a network module", "it needs a function create_network_from_weights")
    return module


def _create(spec: NetworkSpec, model: LoadedModel) -> tuple[Any, dict[str, torch.Tensor]]:
    try:
        created = _module(spec.module).create_network_from_weights(
            spec.multiplier,
            spec.weights,
            model.vae,
            _encoders(model),
            model.unet,
            for_inference=True,
            **spec.arguments,
        )
    except RuntimeError as error:  # torch's word for sizes that do not match, from modules that do not check
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"network {spec.weights} does not fit this model ({reason})", "check the model's family"
        ) from error
    if created is None or created[0] is None:
        raise UserError(f"{spec.module} made no network from {spec.weights}", "check that file and module fit together")
    return created


def _encoders(model: LoadedModel) -> Any:
    """The text encoders in the form of the network interface: one module, or a list of several."""
    return model.text_encoders[0] if len(model.text_encoders) == 1 else list(model.text_encoders)


def _is_mergeable(network: Any, spec: NetworkSpec) -> bool:
    if hasattr(network, "is_mergeable") and network.is_mergeable() and hasattr(network, "merge_to"):
        return True
    log.warning(f"network {spec.weights} cannot be merged: it is applied instead")
    return False


def _apply(
    network: Any,
    weights: dict[str, torch.Tensor],
    model: LoadedModel,
    name: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    channels_last: bool,
) -> None:
    network.apply_to(_encoders(model), model.unet, True, True)
    result = network.load_state_dict(weights, False)
    _check_fit(getattr(result, "unexpected_keys", []), weights, name)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    network.to(device=device, dtype=dtype)
    network.eval().requires_grad_(False)


def _check_fit(unexpected: Sequence[str], weights: dict[str, torch.Tensor], name: str) -> None:
    if weights and len(unexpected) == len(weights):
        raise UserError(f"network {name} fits no layer of this model", "check that it was trained for this family")
    if unexpected:
        log.warning(f"network {name}: {len(unexpected)} of {len(weights)} tensors fit no layer and are left out")
