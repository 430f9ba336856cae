"""The adapter engine: what every method that rides on layers of a model shares.

An adapter network finds layers by the class name of the module around them, names them as the file format wants,
takes over their `forward`, and can merge itself into their weights and restore them. A method (LoRA, LoRA-FA,
DyLoRA, OFT) is a module class that says its parameters, its forward and its merged weight, and a network class
that says which layers it wants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.messages import UserError, log
from networks import clients, files, optimizer_groups, reading


def is_linear_or_conv(layer: nn.Module) -> bool:
    """The layers that most methods ride on, by the name of their class."""
    return type(layer).__name__ in ("Linear", "Conv2d")


def find_layers(
    root: nn.Module,
    prefix: str,
    parent_classes: Collection[str],
    is_layer: Callable[[nn.Module], bool] = is_linear_or_conv,
    *,
    is_text_encoder: bool = False,
) -> Iterator[tuple[str, nn.Module]]:
    """Layers inside every module whose class has one of the names, in the order of `named_modules()`.

    Args:
        prefix: start of the names, e.g. `lora_unet`.
        parent_classes: Python class names; foreign classes only have to carry the same name.
        is_layer: which of the modules inside to take.
        is_text_encoder: name paths as with a `text_model` level, whether or not the installed library has one.

    Yields:
        (name in the file, layer); the name is the path with underscores for dots.
    """
    for path, module in root.named_modules():
        if type(module).__name__ not in parent_classes:
            continue
        if is_text_encoder and not path.startswith("text_model"):
            path = f"text_model.{path}"
        for relative, layer in module.named_modules():
            if is_layer(layer):
                yield ".".join(filter(None, (prefix, path, relative))).replace(".", "_"), layer


def as_list(text_encoder: Any) -> list[nn.Module]:
    """Text encoders as a list: the interface passes one model, a list of them, or None."""
    if text_encoder is None:
        return []
    return list(text_encoder) if isinstance(text_encoder, (list, tuple)) else [text_encoder]


class AdapterModule(nn.Module):
    """Rides on one layer.

    Attributes:
        lora_name: name in the file.
        multiplier: strength, 1 in training.
        org_module: the layer; gone after `apply_to`, so that it is no part of this module's state.
        org_module_ref: the layer in a list, where `nn.Module` does not see it.
        conv_in_files: the layer is a matrix here and a 1x1 convolution in the model's file.
        org_forward: the layer's forward as it was before `apply_to` (possibly that of an earlier network).
        enabled: False makes it transparent.
    """

    def __init__(self, lora_name: str, org_module: nn.Module, multiplier: float = 1.0) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.multiplier = multiplier
        self.org_module = org_module
        self.org_module_ref = [org_module]
        self.conv_in_files = getattr(org_module, "conv_in_files", False)
        self.enabled = True

    def apply_to(self) -> None:
        """Take over the layer's forward."""
        self.org_forward = self.org_module.forward
        self.org_module.forward = self.forward
        del self.org_module

    def merged_weight(self, weight: Tensor, multiplier: float | None = None) -> Tensor:
        """The layer's weight with the adapter in it (float32, shape of the weight), at the module's multiplier."""
        raise NotImplementedError

    def merge_to(self, sd: Mapping[str, Tensor], dtype: torch.dtype | None, device: Any) -> None:
        """Put values from a file (`sd`: names without the module's) into the layer's weight, computed in float32."""
        self.load_state_dict(dict(sd), strict=False)
        weight = self.org_module_ref[0].weight
        work = weight.device if device is None else torch.device(device)
        self.to(work)
        merged = self.merged_weight(weight.detach().to(work, torch.float32))
        with torch.no_grad():
            weight.copy_(merged if dtype is None else merged.to(dtype))


class AdapterNetwork(nn.Module):
    """All adapters of one model, driven by the training and generation scripts through a fixed set of methods.

    Attributes:
        text_encoder_loras, unet_loras: the adapters, in the order of the file.
        multiplier: strength of all of them.
    """

    LORA_PREFIX_UNET = "lora_unet"
    LORA_PREFIX_TEXT_ENCODER = "lora_te"
    LORA_PREFIX_TEXT_ENCODER1 = "lora_te1"
    LORA_PREFIX_TEXT_ENCODER2 = "lora_te2"
    PLUS_PARAMETERS = "lora_up"

    def __init__(self, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.text_encoder_loras: list[Any] = []
        self.unet_loras: list[Any] = []
        self._frozen: list[nn.Module] = []
        self._said_clients = False

    @property
    def adapters(self) -> list[Any]:
        """Every adapter, text encoders first."""
        return [*self.text_encoder_loras, *self.unet_loras]

    def text_encoder_prefixes(self, text_encoders: Collection[nn.Module]) -> list[str]:
        """Start of the names of each text encoder's modules: with a number when there is more than one."""
        if len(text_encoders) == 1:
            return [self.LORA_PREFIX_TEXT_ENCODER]
        return [self.LORA_PREFIX_TEXT_ENCODER1, self.LORA_PREFIX_TEXT_ENCODER2][: len(text_encoders)]

    def check_names(self) -> None:
        """Two adapters of one name would overwrite each other in the file."""
        names = [adapter.lora_name for adapter in self.adapters]
        doubles = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        assert not doubles, f"duplicated module names: {sorted(doubles)}"

    # Strength

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of every adapter."""
        self.multiplier = multiplier
        for adapter in self.adapters:
            adapter.multiplier = multiplier

    def set_enabled(self, is_enabled: bool) -> None:
        """Switch every adapter on or off."""
        for adapter in self.adapters:
            adapter.enabled = is_enabled

    # Attaching

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Take over the layers' forwards and register the adapters as children under their names."""
        if not apply_text_encoder:
            self.text_encoder_loras = []
        if not apply_unet:
            self.unet_loras = []
        log.info(
            "network on: %d modules of the text encoder, %d of the U-Net",
            len(self.text_encoder_loras),
            len(self.unet_loras),
        )
        for adapter in self.adapters:
            adapter.apply_to()
            self.add_module(adapter.lora_name, adapter)

    # Merging

    def is_mergeable(self) -> bool:
        """Whether `merge_to` works."""
        return True

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        """Add the values of a file to the layers' weights for good.

        Args:
            weights_sd: the file's tensors.
            dtype: rounding of the merged weight; the layer keeps its own dtype.
            device: where the computation runs; None = where each weight lies.
        """
        by_module = files.group_by_module(self.own_names(weights_sd))
        merged = 0
        for adapter in self.adapters:
            if adapter.lora_name in by_module:
                adapter.merge_to(by_module[adapter.lora_name], dtype, device)
                merged += 1
        log.info("merged %d modules into the weights", merged)

    def backup_weights(self) -> None:
        """Keep a copy of each layer's weight, once for all networks."""
        for layer in self._layers():
            if not hasattr(layer, "_lora_org_weight"):
                layer._lora_org_weight = layer.weight.detach().clone()
                layer._lora_restored = True

    def restore_weights(self) -> None:
        """Put the copies back where `pre_calculation` changed the weights."""
        for layer in self._layers():
            if not layer._lora_restored:
                with torch.no_grad():
                    layer.weight.copy_(layer._lora_org_weight)
                layer._lora_restored = True

    def pre_calculation(self) -> None:
        """Merge into the weights for a while (until `restore_weights`) and leave the forwards plain."""
        for adapter in self.adapters:
            layer = adapter.org_module_ref[0]
            merged = adapter.merged_weight(layer.weight.detach().float())
            with torch.no_grad():
                layer.weight.copy_(merged)
            layer._lora_restored = False
            adapter.enabled = False

    def _layers(self) -> Iterator[nn.Module]:
        return (adapter.org_module_ref[0] for adapter in self.adapters)

    # Files

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors under the names that this network uses."""
        return dict(weights)

    def load_weights(self, file: str) -> Any:
        """Load a file of this method, non-strictly; returns torch's report of missing and unexpected keys.

        Raises:
            UserError: no module of the file belongs to this model, or its tensors have other sizes.
        """
        weights = self.own_names(reading.read_network(file))
        files.check_match(weights, self.adapters, str(file))
        return self.load_state_dict(weights, strict=False)

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Write the adapters' tensors.

        Args:
            file: `.safetensors` with metadata and hashes, anything else a plain torch pickle.
            dtype: of every tensor, alphas included; None = as they are.
            metadata: texts for the header.
        """
        state = self.file_state()
        files.write_weights(state, file, dtype, metadata)
        if not self._said_clients:
            self._said_clients = True
            log.info("%s", clients.line(state))

    def file_state(self) -> dict[str, Tensor]:
        """The adapters' tensors in the shapes that files have.

        A layer that stands for a 1x1 convolution of the model's file (`conv_in_files`) is written as one.
        """
        state = dict(self.state_dict())
        for adapter in self.adapters:
            if adapter.conv_in_files:
                for name, tensor in adapter.state_dict().items():
                    if tensor.dim() == 2:
                        state[f"{adapter.lora_name}.{name}"] = tensor[:, :, None, None]
        return state

    # Training

    def enable_gradient_checkpointing(self) -> None:
        """Adapters keep nothing worth recomputing: the layers around them are checkpointed."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Everything trains but the parts whose learning rate is 0."""
        self.requires_grad_(True)
        for adapter in self._frozen:
            adapter.requires_grad_(False)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Training mode: dropouts draw."""
        self.train()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """What the optimizer trains."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def optimizer_groups(self, parts: Iterable[optimizer_groups.Part]) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups and their descriptions; parts with rate 0 are frozen instead."""
        parts = list(parts)
        self.requires_grad_(True)
        self._frozen = [adapter for part in parts if part.lr == 0 for adapter in part.adapters]
        for adapter in self._frozen:
            adapter.requires_grad_(False)
        groups, descriptions = optimizer_groups.build(parts, self.PLUS_PARAMETERS)
        if not groups:
            raise UserError(
                "no part of the network has a learning rate", "set --learning_rate, --unet_lr or --text_encoder_lr"
            )
        return groups, descriptions
