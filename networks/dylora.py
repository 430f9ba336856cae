"""DyLoRA: LoRA that is trained for all ranks at once, so that a file can be cut to a lower rank afterwards.

`--network_module networks.dylora`, with `unit` in `--network_args`. Every module is made of rank-one pieces. In each
training step a module draws a piece (a group of `unit` pieces), trains it alone and weighs the whole update for the
rank that ends there. Files hold plain LoRA (`extract_lora_from_dylora.py` cuts them); drawing uses the full rank.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.messages import UserError, log, warn_once
from networks import creation, files, low_rank, names
from networks.adapter import AdapterModule, as_list, find_layers
from networks.lora_module import LoRAInfModule
from networks.part_rates import PartRates
from networks.regions import RegionalNetwork

ARGUMENTS = ("conv_dim", "conv_alpha", "unit", *creation.LORAPLUS_ARGUMENTS)


class DyLoRAModule(AdapterModule):
    """Rank-one pieces on one Linear or Conv2d, for training.

    Attributes:
        lora_A: r times (1, in) or, for larger kernels, (1, in, k, k); lora_B: r times (out, 1) or (out, 1, 1, 1).
        alpha: 0-dim buffer; scale: alpha / rank.
        unit: pieces that are trained together.
    """

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float | Tensor | None = 1,
        unit: int = 1,
    ) -> None:
        """
        Raises:
            UserError: the rank is no multiple of the unit.
        """
        super().__init__(lora_name, org_module, multiplier)
        if lora_dim % unit:
            raise UserError(f"rank {lora_dim} is no multiple of unit {unit}", "change --network_dim or unit")
        self.lora_dim, self.unit = lora_dim, unit
        self.is_conv = type(org_module).__name__ == "Conv2d"
        self.is_pointwise = not self.is_conv or tuple(org_module.kernel_size) == (1, 1)
        if self.is_conv:
            down, out = (org_module.in_channels, *org_module.kernel_size), org_module.out_channels
            self.stride, self.padding = org_module.stride, org_module.padding
        else:
            down, out = (org_module.in_features,), org_module.out_features
            self.stride, self.padding = 1, 0
        down = down[:1] if self.is_pointwise else down
        up = (out, 1) if self.is_pointwise else (out, 1, 1, 1)
        self.lora_A = nn.ParameterList([nn.Parameter(torch.empty(1, *down)) for _ in range(lora_dim)])
        self.lora_B = nn.ParameterList([nn.Parameter(torch.zeros(up)) for _ in range(lora_dim)])
        for piece in self.lora_A:
            nn.init.kaiming_uniform_(piece, a=math.sqrt(5))
        alpha = alpha.detach().float().item() if isinstance(alpha, Tensor) else alpha
        alpha = lora_dim if alpha is None or alpha == 0 else alpha
        self.scale = alpha / lora_dim
        self.register_buffer("alpha", torch.tensor(alpha))
        self._fused_layer: list[nn.Module] = []
        self._holds_draw = False
        self._drawn: int | None = None

    def apply_to(self) -> None:
        """Take over the layer's forward; a plain layer's own computation is fused with the update."""
        if low_rank.can_fuse(self.org_module):
            self._fused_layer = [self.org_module]
        super().apply_to()

    def start_step(self) -> None:
        """From now on one draw serves every forward until the next call: checkpointing computes some twice."""
        self._holds_draw, self._drawn = True, None

    def draw(self) -> int:
        """First of the pieces that are trained, a multiple of the unit."""
        if self._holds_draw and self._drawn is not None:
            return self._drawn
        rank = random.randint(0, self.lora_dim - 1)
        self._drawn = rank - rank % self.unit
        return self._drawn

    def forward(self, x: Tensor) -> Tensor:
        """In training with the weight of the drawn rank; otherwise the full rank at the module's multiplier."""
        if not self.enabled:
            return self.org_forward(x)
        if not self.training:
            return self._with_update(x, *self.matrices(), self.multiplier * self.scale)
        first = self.draw()
        last = first + self.unit
        return self._with_update(x, *self.matrices(first, last), self.scale * math.sqrt(self.lora_dim / last))

    def matrices(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        """All pieces as `lora_down` and `lora_up` have them in files; those outside first..last get no gradient."""
        last = self.lora_dim if last is None else last

        def joined(pieces: nn.ParameterList, dim: int) -> Tensor:
            return torch.cat([p if first <= i < last else p.detach() for i, p in enumerate(pieces)], dim)

        down, up = joined(self.lora_A, 0), joined(self.lora_B, 1)
        if self.is_conv and self.is_pointwise:
            return down[:, :, None, None], up[:, :, None, None]
        return down, up

    def _with_update(self, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        if self._fused_layer and not torch.compiler.is_compiling() and not self._fused_layer[0].weight.requires_grad:
            return low_rank.fused(x, self._fused_layer[0], down, up, scale)
        base = self.org_forward(x)
        if not self.is_conv:
            return low_rank.add_to_rows(
                base, nn.functional.linear(x, low_rank.match(down, x)), low_rank.match(up, base), scale
            )
        hidden = nn.functional.conv2d(x, low_rank.match(down, x), None, self.stride, self.padding)
        return low_rank.add_to_pixels(base, hidden, low_rank.match(up, base), scale)

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """The update at full rank as a weight of the layer's shape, float32."""
        down, up = (matrix.detach().float() for matrix in self.matrices())
        delta = (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
        return delta * ((self.multiplier if multiplier is None else multiplier) * self.scale)

    def merged_weight(self, weight: Tensor, multiplier: float | None = None) -> Tensor:
        """The layer's weight plus the update at full rank."""
        return weight.float() + self.get_weight(multiplier).to(weight.device)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Plain LoRA: `alpha`, `lora_down.weight`, `lora_up.weight`."""
        state = {} if destination is None else destination
        down, up = self.matrices()
        own = {"alpha": self.alpha, "lora_down.weight": down, "lora_up.weight": up}
        state.update({prefix + key: value if keep_vars else value.detach() for key, value in own.items()})
        return state

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Cut a file's matrices into pieces; 1x1 convolutions and matrices are read for each other."""
        own = self.state_dict(prefix=prefix)
        pieces = {"lora_down.weight": ("lora_A", 0), "lora_up.weight": ("lora_B", 1)}
        for key, (name, dim) in pieces.items():
            given = state_dict.pop(prefix + key, None)
            if given is None:
                missing_keys.append(prefix + key)
            elif given.shape != own[prefix + key].shape and not files.same_but_ones(
                given.shape, own[prefix + key].shape
            ):
                error_msgs.append(f"{prefix}{key} is {tuple(given.shape)}, here {tuple(own[prefix + key].shape)}")
                given = None
            source = own[prefix + key] if given is None else given
            for index, piece in enumerate(getattr(self, name)):
                cut = source.narrow(dim, index, 1).reshape(piece.shape)
                state_dict[f"{prefix}{name}.{index}"] = cut
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if f"{prefix}alpha" in state_dict and not self.alpha.is_meta:
            self.scale = float(self.alpha) / self.lora_dim


class DyLoRANetwork(PartRates, RegionalNetwork):
    """DyLoRA modules of a U-Net and its text encoders; plain LoRA modules when made for drawing."""

    UNET_TARGET_REPLACE_MODULE: ClassVar[list[str]] = ["Transformer2DModel"]
    UNET_TARGET_REPLACE_MODULE_CONV2D_3X3: ClassVar[list[str]] = ["ResnetBlock2D", "Downsample2D", "Upsample2D"]
    TEXT_ENCODER_TARGET_REPLACE_MODULE: ClassVar[list[str]] = ["CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"]
    PLUS_PARAMETERS = "lora_B"

    def __init__(
        self,
        text_encoder: Any,
        unet: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float = 1,
        apply_to_conv: bool = False,
        modules_dim: Mapping[str, int] | None = None,
        modules_alpha: Mapping[str, Any] | None = None,
        unit: int = 1,
        module_class: type = DyLoRAModule,
        varbose: bool = False,
    ) -> None:
        """
        Args:
            text_encoder: one model, a list of them, or None.
            apply_to_conv: also convolutions other than 1x1.
            modules_dim, modules_alpha: rank and alpha by module name, from a file; overrides the others.
            unit: pieces that are trained together.
            module_class: `LoRAInfModule` for drawing.
            varbose: list the modules.
        """
        super().__init__(multiplier)
        self.lora_dim, self.alpha, self.apply_to_conv, self.unit = lora_dim, alpha, apply_to_conv, unit
        units = {"unit": unit} if issubclass(module_class, DyLoRAModule) else {}

        def modules(found: Any) -> list[Any]:
            made = []
            for name, layer in found:
                is_conv = type(layer).__name__ == "Conv2d" and tuple(layer.kernel_size) != (1, 1)
                if modules_dim is not None:
                    rank, of_file = modules_dim.get(name), (modules_alpha or {}).get(name)
                else:
                    rank, of_file = (None if is_conv and not apply_to_conv else lora_dim), alpha
                if rank:
                    made.append(module_class(name, layer, multiplier, rank, of_file, **units))
            return made

        encoders = as_list(text_encoder)
        for prefix, encoder in zip(self.text_encoder_prefixes(encoders), encoders, strict=True):
            classes = self.TEXT_ENCODER_TARGET_REPLACE_MODULE
            self.text_encoder_loras += modules(find_layers(encoder, prefix, classes, is_text_encoder=True))
        wants_conv = apply_to_conv or modules_dim is not None
        targets = self.UNET_TARGET_REPLACE_MODULE + (self.UNET_TARGET_REPLACE_MODULE_CONV2D_3X3 if wants_conv else [])
        self.unet_loras = modules(find_layers(unet, self.LORA_PREFIX_UNET, targets))
        self.check_names()
        counts = len(self.text_encoder_loras), len(self.unet_loras)
        log.info("DyLoRA: %d modules for text encoders, %d for the U-Net, unit %d", *counts, unit)
        if varbose:
            log.info("modules: %s", ", ".join(adapter.lora_name for adapter in self.adapters))

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors under this U-Net's names, whichever of the naming styles it has."""
        return names.convert_if_needed(weights, [adapter.lora_name for adapter in self.unet_loras])

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Every module draws anew in this step, once."""
        for adapter in self.adapters:
            if isinstance(adapter, DyLoRAModule):
                adapter.start_step()


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    **kwargs: Any,
) -> DyLoRANetwork:
    """A new network for training.

    Args:
        network_dim, network_alpha: rank (None = 4) and alpha (None = 1) of every layer.
        kwargs: `conv_dim` (the rank, to adapt 3x3 convolutions too), `unit`, LoRA+ ratios.

    Raises:
        UserError: another rank for convolutions, or a rank that is no multiple of the unit.
    """
    if any(kwargs.pop(key, None) for key in ("neuron_dropout", "dropout")):
        warn_once("DyLoRA has no dropout: --network_dropout has no effect")
    creation.warn_unknown(kwargs, ARGUMENTS, "in networks.dylora")
    dim = creation.DEFAULT_DIM if network_dim is None else int(network_dim)
    alpha = creation.DEFAULT_ALPHA if network_alpha is None else network_alpha
    conv_dim = creation.number(kwargs, "conv_dim", int)
    if conv_dim is not None and conv_dim != dim:
        raise UserError(f"DyLoRA has one rank: conv_dim {conv_dim} differs from {dim}", f"give conv_dim={dim}")
    network = DyLoRANetwork(
        text_encoder, unet, multiplier, dim, alpha, apply_to_conv=conv_dim is not None, unit=_unit(kwargs)
    )
    creation.set_loraplus(network, kwargs)
    return network


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[DyLoRANetwork, dict[str, Tensor]]:
    """A network with the ranks and alphas of a file; its values are for the caller to load or merge.

    Args:
        for_inference: plain LoRA modules of the full rank, which can be merged and confined to regions.
        kwargs: `unit` and LoRA+ ratios.

    Returns:
        The network, and the file's tensors under the network's names.

    Raises:
        UserError: the file is of another family or method.
    """
    weights, source = creation.read(file, weights_sd, unet)
    creation.warn_unknown(kwargs, ("unit", *creation.LORAPLUS_ARGUMENTS), "with the ranks of a file")
    dims, alphas = creation.ranks_and_alphas(weights)
    network = DyLoRANetwork(
        text_encoder,
        unet,
        multiplier,
        modules_dim=dims,
        modules_alpha=alphas,
        unit=_unit(kwargs),
        module_class=LoRAInfModule if for_inference else DyLoRAModule,
    )
    files.check_match(weights, network.adapters, source)
    creation.set_loraplus(network, kwargs)
    return network, weights


def _unit(kwargs: Mapping[str, Any]) -> int:
    unit = creation.number(kwargs, "unit", int)
    if unit is not None and unit < 1:
        raise UserError(f"network argument unit={unit} is not positive", "give unit=1 or more")
    return unit or 1
