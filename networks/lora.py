"""LoRA: low-rank updates of linear layers (LierLa) and, with a convolution rank, of all convolutions (C3Lier).

`--network_module networks.lora`. Third parties import, subclass and call what stands here; names, argument order
and file format are those of sd-scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from library.messages import UserError, log
from networks import creation, names, weight_norm
from networks.adapter import as_list, find_layers
from networks.block_functions import (
    get_block_dims_and_alphas,
    get_block_lr_weight,
    parse_block_lr_kwargs,
    remove_block_dims_and_alphas,
)
from networks.blocks import NUM_OF_BLOCKS, RE_UPDOWN, SDXL, all_weights, get_block_index, layout_of
from networks.lora_module import LoRAInfModule, LoRAModule
from networks.names import convert_diffusers_to_sai_if_needed
from networks.optimizer_groups import Part
from networks.part_rates import PartRates
from networks.regions import RegionalNetwork

__all__ = [
    "RE_UPDOWN",
    "LoRAInfModule",
    "LoRAModule",
    "LoRANetwork",
    "convert_diffusers_to_sai_if_needed",
    "create_network",
    "create_network_from_weights",
    "get_block_dims_and_alphas",
    "get_block_index",
    "get_block_lr_weight",
    "parse_block_lr_kwargs",
    "remove_block_dims_and_alphas",
]


class LoRANetwork(PartRates, RegionalNetwork):
    """LoRA modules of a U-Net and its text encoders."""

    NUM_OF_BLOCKS = NUM_OF_BLOCKS
    MODULE_CLASS: ClassVar[type] = LoRAModule
    INFERENCE_CLASS: ClassVar[type] = LoRAInfModule
    UNET_TARGET_REPLACE_MODULE: ClassVar[list[str]] = ["Transformer2DModel"]
    UNET_TARGET_REPLACE_MODULE_CONV2D_3X3: ClassVar[list[str]] = ["ResnetBlock2D", "Downsample2D", "Upsample2D"]
    TEXT_ENCODER_TARGET_REPLACE_MODULE: ClassVar[list[str]] = ["CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"]

    def __init__(
        self,
        text_encoder: Any,
        unet: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float = 1,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
        conv_lora_dim: int | None = None,
        conv_alpha: float | None = None,
        block_dims: Sequence[int] | None = None,
        block_alphas: Sequence[float] | None = None,
        conv_block_dims: Sequence[int] | None = None,
        conv_block_alphas: Sequence[float] | None = None,
        modules_dim: Mapping[str, int] | None = None,
        modules_alpha: Mapping[str, Any] | None = None,
        module_class: type = LoRAModule,
        varbose: bool = False,
    ) -> None:
        """
        Args:
            text_encoder: one model, a list of them, or None.
            conv_lora_dim: rank of convolutions other than 1x1; None leaves them out.
            block_dims, block_alphas: 25 values (SDXL 23) for the U-Net's linear layers and 1x1 convolutions.
            conv_block_dims, conv_block_alphas: as many for its other convolutions.
            modules_dim, modules_alpha: rank and alpha by module name, from a file; overrides everything else.
            varbose: list the layers that get no module.
        """
        super().__init__(multiplier)
        self.lora_dim, self.alpha = lora_dim, alpha
        self.conv_lora_dim, self.conv_alpha = conv_lora_dim, conv_alpha
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.block_dims, self.block_alphas = block_dims, block_alphas
        self.conv_block_dims, self.conv_block_alphas = conv_block_dims, conv_block_alphas
        self.modules_dim, self.modules_alpha = modules_dim, modules_alpha or {}
        self.module_class = module_class
        self.layout = layout_of(names.unet_names(unet))
        self.block_lr_weight: list[float] | None = None
        self.block_lr = False

        skipped: list[str] = []
        encoders = as_list(text_encoder)
        for prefix, encoder in zip(self.text_encoder_prefixes(encoders), encoders, strict=True):
            found = find_layers(encoder, prefix, self.TEXT_ENCODER_TARGET_REPLACE_MODULE, is_text_encoder=True)
            self.text_encoder_loras += self._make_modules(found, False, skipped)
        found = find_layers(unet, self.LORA_PREFIX_UNET, self._unet_targets())
        self.unet_loras = self._make_modules(found, True, skipped)
        self.check_names()
        self._say(varbose, skipped)

    def _unet_targets(self) -> list[str]:
        wants_conv = self.modules_dim is not None or self.conv_lora_dim is not None or self.conv_block_dims is not None
        return self.UNET_TARGET_REPLACE_MODULE + (self.UNET_TARGET_REPLACE_MODULE_CONV2D_3X3 if wants_conv else [])

    def _make_modules(self, found: Any, is_unet: bool, skipped: list[str]) -> list[LoRAModule]:
        modules = []
        for name, layer in found:
            is_conv = type(layer).__name__ == "Conv2d" and tuple(layer.kernel_size) != (1, 1)
            rank, alpha = self._rank_and_alpha(name, is_unet, is_conv)
            if rank:
                modules.append(
                    self.module_class(
                        name,
                        layer,
                        self.multiplier,
                        rank,
                        alpha,
                        dropout=self.dropout,
                        rank_dropout=self.rank_dropout,
                        module_dropout=self.module_dropout,
                    )
                )
            elif not is_conv or self.conv_lora_dim is not None or self.conv_block_dims is not None:
                skipped.append(name)
        return modules

    def _rank_and_alpha(self, name: str, is_unet: bool, is_conv: bool) -> tuple[int | None, Any]:
        """What a layer's module gets; rank None or 0 means no module."""
        if self.modules_dim is not None:
            return self.modules_dim.get(name), self.modules_alpha.get(name)
        if is_unet and self.block_dims is not None:
            index = self.get_block_index(name)
            if index < 0:
                raise UserError(f"block ranks and weights: {name} has no block", "leave them out")
            if not is_conv:
                assert self.block_alphas is not None, "given with block_dims"
                return self.block_dims[index], self.block_alphas[index]
            if self.conv_block_dims is None:
                return None, None
            assert self.conv_block_alphas is not None, "given with conv_block_dims"
            return self.conv_block_dims[index], self.conv_block_alphas[index]
        return (self.conv_lora_dim, self.conv_alpha) if is_conv else (self.lora_dim, self.alpha)

    def _say(self, varbose: bool, skipped: list[str]) -> None:
        if self.modules_dim is not None:
            log.info("LoRA with the ranks of a file")
        elif self.block_dims is not None:
            log.info("LoRA with ranks by block: %s, convolutions: %s", self.block_dims, self.conv_block_dims)
        else:
            log.info("LoRA with rank %s, alpha %s", self.lora_dim, self.alpha)
            if self.conv_lora_dim is not None:
                log.info("convolutions with rank %s, alpha %s", self.conv_lora_dim, self.conv_alpha)
        log.info(
            "LoRA: %d modules for text encoders, %d for the U-Net", len(self.text_encoder_loras), len(self.unet_loras)
        )
        if varbose and skipped and self.modules_dim is None:
            log.info("%d layers have rank 0 and get no module: %s", len(skipped), ", ".join(skipped))

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors under this U-Net's names, whichever of the two naming styles it has."""
        return names.convert_if_needed(weights, [adapter.lora_name for adapter in self.unet_loras])

    # Learning rates

    def set_block_lr_weight(
        self,
        up_lr_weight: Sequence[float] | None = None,
        mid_lr_weight: float | Sequence[float] | None = None,
        down_lr_weight: Sequence[float] | None = None,
    ) -> None:
        """Learning-rate weights of the blocks on the way up, in the middle and on the way down (missing ones: 1).

        As the only argument, a list with a weight for every block, in the order down, mid, up, is taken too.
        """
        self.block_lr = True
        if up_lr_weight is not None and mid_lr_weight is None and len(up_lr_weight) == self.layout.total:
            self.block_lr_weight = list(up_lr_weight)
            return
        mid = [mid_lr_weight] if isinstance(mid_lr_weight, (int, float)) else mid_lr_weight
        self.block_lr_weight = all_weights(self.layout, down_lr_weight, mid, up_lr_weight)

    def get_block_index(self, lora_name: str) -> int:
        """Block of a module in this U-Net's layout; -1 where it has none."""
        return get_block_index(lora_name, self.layout is SDXL)

    def get_lr_weight(self, lora: LoRAModule) -> float:
        """Learning-rate weight of a module by its block; 1 where nothing is given."""
        index = self.get_block_index(lora.lora_name)
        return 1.0 if index < 0 or self.block_lr_weight is None else self.block_lr_weight[index]

    def _unet_parts(self, unet_lr: float | None, default_lr: float | None) -> list[Part]:
        if not self.block_lr:
            return super()._unet_parts(unet_lr, default_lr)
        ratio = self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio
        rate = default_lr if unet_lr is None else unet_lr
        if rate is None:
            raise UserError("block learning-rate weights need a rate to multiply", "set --unet_lr or --learning_rate")
        blocks: dict[int, list[LoRAModule]] = {}
        for lora in self.unet_loras:
            blocks.setdefault(self.get_block_index(lora.lora_name), []).append(lora)
        return [
            Part(f"unet_block{index}", loras, rate * self.get_lr_weight(loras[0]), ratio)
            for index, loras in blocks.items()
        ]

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Shrink every module whose update's norm exceeds the cap.

        Returns:
            0-dim tensors on the device: modules scaled, mean and largest norm afterwards.
        """
        return weight_norm.cap(self.adapters, max_norm_value)


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
