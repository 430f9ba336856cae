"""The modules of LoRA: a low-rank update of one layer, for training and for generation."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import files, low_rank
from networks.adapter import AdapterModule
from networks.regions import RegionalModule


class LoRAModule(AdapterModule):
    """`y = layer(x) + multiplier * alpha / rank * up(down(x))` for one Linear or Conv2d.

    Attributes:
        lora_down, lora_up: Linear (r, in), (out, r), or Conv2d (r, in, k, k) and (out, r, 1, 1).
        alpha: 0-dim buffer; scale: alpha / rank.
    """

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float | Tensor | None = 1,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
    ) -> None:
        """
        Args:
            alpha: None or 0 means the rank.
            dropout, rank_dropout, module_dropout: chances to drop a hidden value, a rank, the whole module.
        """
        super().__init__(lora_name, org_module, multiplier)
        self.lora_dim = lora_dim
        self.is_conv = type(org_module).__name__ == "Conv2d"
        self.make_layers(org_module, lora_dim)
        alpha = alpha.detach().float().item() if isinstance(alpha, Tensor) else alpha
        alpha = lora_dim if alpha is None or alpha == 0 else alpha
        self.scale = alpha / lora_dim
        self.register_buffer("alpha", torch.tensor(alpha))
        self.initialize()
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self._drops = any(p is not None for p in (dropout, rank_dropout, module_dropout))
        self._fused_layer: list[nn.Module] = []

    def make_layers(self, layer: Any, rank: int) -> None:
        """`lora_down` and `lora_up` for a layer, with their constructors' draws in this order."""
        if self.is_conv:
            kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
            self.lora_down = nn.Conv2d(layer.in_channels, rank, kernel, stride, padding, bias=False)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, (1, 1), (1, 1), bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)

    def initialize(self) -> None:
        """Starting values: no update at first."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def apply_to(self) -> None:
        """Take over the layer's forward; a plain layer's own computation is fused with the update."""
        if low_rank.can_fuse(self.org_module):
            self._fused_layer = [self.org_module]
        super().apply_to()

    def forward(self, x: Tensor) -> Tensor:
        """The layer with its update; dropouts only in training."""
        if not self.enabled:
            return self.org_forward(x)
        if self._drops and self.training:
            return self._dropout_forward(x)
        return self.default_forward(x)

    def default_forward(self, x: Tensor) -> Tensor:
        """Layer and update without dropout: two kernels more than the layer alone."""
        down, up = self.lora_down.weight, self.lora_up.weight
        scale = self.multiplier * self.scale
        if self._fused_layer and not torch.compiler.is_compiling():
            layer = self._fused_layer[0]
            if not layer.weight.requires_grad:
                return low_rank.fused(x, layer, down, up, scale)
        base = self.org_forward(x)
        hidden = self._down(x)
        add = low_rank.add_to_pixels if self.is_conv else low_rank.add_to_rows
        return add(base, hidden, low_rank.match(up, base), scale)

    def low_rank_output(self, x: Tensor) -> Tensor:
        """The update alone, scaled."""
        return self._up(self._down(x)) * (self.multiplier * self.scale)

    def _down(self, x: Tensor) -> Tensor:
        weight = low_rank.match(self.lora_down.weight, x)
        if self.is_conv:
            return F.conv2d(x, weight, None, self.lora_down.stride, self.lora_down.padding)
        return F.linear(x, weight)

    def _up(self, hidden: Tensor) -> Tensor:
        weight = low_rank.match(self.lora_up.weight, hidden)
        return F.conv2d(hidden, weight) if self.is_conv else F.linear(hidden, weight)

    def _dropout_forward(self, x: Tensor) -> Tensor:
        base = self.org_forward(x)
        if self.module_dropout is not None and torch.rand(1) < self.module_dropout:
            return base
        hidden = self._down(x)
        scale = self.multiplier * self.scale
        if self.dropout is not None:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout is not None:
            keep = torch.rand((hidden.shape[0], self.lora_dim), device=hidden.device) > self.rank_dropout
            shape = {3: (-1, 1, self.lora_dim), 4: (-1, self.lora_dim, 1, 1)}.get(hidden.dim(), (-1, self.lora_dim))
            hidden = hidden * keep.view(shape)
            scale = scale / (1.0 - self.rank_dropout)
        return base + self._up(hidden) * scale

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """The update as a weight of the layer's shape, float32, at a strength (default: the module's)."""
        multiplier = self.multiplier if multiplier is None else multiplier
        down, up = self.lora_down.weight.detach().float(), self.lora_up.weight.detach().float()
        delta = up.flatten(1) @ down.flatten(1)
        return delta.view(up.shape[0], *down.shape[1:]) * (multiplier * self.scale)

    def merged_weight(self, weight: Tensor, multiplier: float | None = None) -> Tensor:
        """The layer's weight plus the update."""
        return weight.float() + self.get_weight(multiplier).to(weight.device)

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        """A loaded alpha also sets the scale, so that a file works as strongly here as anywhere.

        1x1 convolutions and matrices are read for each other: SD 2.x projections exist in both forms.
        """
        for key, own in self.state_dict(prefix=prefix).items():
            given = state_dict.get(key)
            if given is not None and files.same_but_ones(given.shape, own.shape):
                state_dict[key] = given.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}alpha" in state_dict and not self.alpha.is_meta:
            self.scale = float(self.alpha) / self.lora_dim


class LoRAInfModule(RegionalModule, LoRAModule):
    """The module for generation: merging, regions, no dropout."""

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float | Tensor | None = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(lora_name, org_module, multiplier, lora_dim, alpha)
        self.network = None
        self.is_regional = self.takes_sub_prompt = self.is_text_encoder = False

    def forward(self, x: Tensor) -> Tensor:
        """The layer with its update, confined to the network's region if it has one."""
        if not self.enabled:
            return self.org_forward(x)
        if self.network is None or self.network.sub_prompt_index is None:
            return self.default_forward(x)
        if self.is_regional or self.takes_sub_prompt:
            return self.regional_forward(x)
        return self.default_forward(x)
