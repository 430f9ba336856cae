"""LoRA-FA: LoRA whose down matrices keep their random start, so that only the up matrices are trained.

`--network_module networks.lora_fa`. Arguments, names and files are those of `networks.lora`; a trained file loads
there too. Activations in front of the down matrices need not be kept, which saves memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from networks import creation, lora, lora_module

__all__ = ["LoRAInfModule", "LoRAModule", "LoRANetwork", "create_network", "create_network_from_weights"]

LoRAInfModule = lora_module.LoRAInfModule


class LoRAModule(lora_module.LoRAModule):
    """A LoRA module whose `lora_down` never trains."""

    def initialize(self) -> None:
        """`lora_down` normal with standard deviation sqrt(2 / (inputs + rank)), `lora_up` zero."""
        inputs = self.lora_down.weight[0].numel()
        nn.init.normal_(self.lora_down.weight, std=(2 / (inputs + self.lora_dim)) ** 0.5)
        nn.init.zeros_(self.lora_up.weight)
        self.lora_down.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> LoRAModule:
        """Train `lora_up` or not; `lora_down` stays frozen."""
        self.lora_up.requires_grad_(requires_grad)
        self.lora_down.requires_grad_(False)
        return self

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """What the optimizer trains."""
        return self.lora_up.parameters()


class LoRANetwork(lora.LoRANetwork):
    """LoRA-FA modules of a U-Net and its text encoders."""

    MODULE_CLASS: ClassVar[type] = LoRAModule

    def requires_grad_(self, requires_grad: bool = True) -> LoRANetwork:
        """Train the up matrices or not."""
        for adapter in self.adapters:
            adapter.requires_grad_(requires_grad)
        return self


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A new network for training; arguments and errors: `creation.create`."""
    return creation.create(
        LoRANetwork, multiplier, network_dim, network_alpha, text_encoder, unet, neuron_dropout, kwargs
    )


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """A network with the ranks and alphas of a file, and the file's tensors: `creation.create_from_weights`."""
    return creation.create_from_weights(
        LoRANetwork, multiplier, file, text_encoder, unet, weights_sd, for_inference, kwargs
    )
