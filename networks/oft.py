"""Orthogonal fine-tuning: the output channels of U-Net layers are rotated in blocks, the weights' angles stay.

`--network_module networks.oft`. `--network_dim` is the number of blocks of a layer, `--network_alpha` the share of its
outputs that bounds the rotation. The weight is rotated, the bias is not: a merged model gives the same pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.messages import UserError, log, warn_once
from networks import creation, files, names, reading
from networks.adapter import AdapterModule, AdapterNetwork, find_layers
from networks.optimizer_groups import Part

DEFAULT_DIM = 4
DEFAULT_ALPHA = 1.0
ARGUMENTS = ("enable_all_linear", "enable_conv")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "")


class OFTModule(AdapterModule):
    """Rotates the output channels of one Linear or Conv2d.

    Attributes:
        oft_blocks: (n, b, b) with n b = outputs; a rotation's generator is its antisymmetric part.
        alpha: 0-dim buffer: the generators' norm is at most alpha times the outputs.
    """

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        dim: int = DEFAULT_DIM,
        alpha: float | Tensor | None = DEFAULT_ALPHA,
    ) -> None:
        """
        Raises:
            UserError: the layer's outputs do not fall into `dim` blocks.
        """
        super().__init__(lora_name, org_module, multiplier)
        self.is_conv = "Conv2d" in type(org_module).__name__
        self.out_dim = org_module.out_channels if self.is_conv else org_module.out_features
        if self.out_dim % dim:
            raise UserError(
                f"{lora_name} has {self.out_dim} outputs, which do not fall into {dim} equal blocks",
                "give a --network_dim that divides them, such as 4 or 8",
            )
        self.num_blocks, self.block_size = dim, self.out_dim // dim
        self.oft_blocks = nn.Parameter(torch.zeros(dim, self.block_size, self.block_size))
        if not isinstance(alpha, Tensor):
            alpha = torch.tensor(DEFAULT_ALPHA if alpha is None else alpha)
        self.register_buffer("alpha", alpha.detach().clone().reshape(()))
        self._owns_layer = False

    def apply_to(self) -> None:
        """Take over the layer's forward."""
        layer = self.org_module
        plain = {nn.Linear: nn.Linear.forward, nn.Conv2d: nn.Conv2d.forward}.get(type(layer))
        self._owns_layer = plain is not None and getattr(layer.forward, "__func__", None) is plain
        super().apply_to()

    def rotations(self, multiplier: float | None = None) -> Tensor:
        """The blocks' rotations, (n, b, b) float32: Cayley transforms, drawn towards the identity by the multiplier."""
        multiplier = self.multiplier if multiplier is None else multiplier
        blocks = self.oft_blocks
        with torch.autocast(blocks.device.type, enabled=False):
            blocks = blocks.float()
            generators = blocks - blocks.mT
            norm = generators.norm()
            limit = self.alpha.float() * self.out_dim
            generators = generators * ((torch.minimum(norm, limit) + 1e-8) / (norm + 1e-8))
            eye = torch.eye(self.block_size, device=blocks.device)
            rotations = torch.linalg.solve(eye - generators, eye + generators)  # the two factors commute
            return rotations if multiplier == 1 else eye + multiplier * (rotations - eye)

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """The whole rotation, (out, out) float32."""
        return torch.block_diag(*self.rotations(multiplier).detach())

    def forward(self, x: Tensor) -> Tensor:
        """The layer with a rotated weight."""
        if not self.enabled or self.multiplier == 0:
            return self.org_forward(x)
        layer = self.org_module_ref[0]
        if not self._owns_layer:
            return self._rotated_output(self.org_forward(x), layer.bias)
        weight = self._rotate(layer.weight)
        weight = weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)
        if self.is_conv:
            return layer._conv_forward(x, weight, layer.bias)
        return F.linear(x, weight, layer.bias)

    def _rotate(self, weight: Tensor, multiplier: float | None = None) -> Tensor:
        """R^T W over the output axis, block by block, float32."""
        with torch.autocast(weight.device.type, enabled=False):
            rows = weight.float().reshape(self.num_blocks, self.block_size, -1)
            return torch.bmm(self.rotations(multiplier).mT.to(weight.device), rows).view(weight.shape)

    def _rotated_output(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """The same for a layer that another network has changed: y without its bias, times R."""
        if self.is_conv:
            y = y.movedim(1, -1)
        if bias is not None:
            y = y - bias
        blocks = y.unflatten(-1, (self.num_blocks, self.block_size))
        y = torch.einsum("...ni,nij->...nj", blocks, self.rotations().to(y.dtype)).flatten(-2)
        if bias is not None:
            y = y + bias
        return y.movedim(-1, 1) if self.is_conv else y

    @torch.no_grad()
    def merged_weight(self, weight: Tensor, multiplier: float | None = None) -> Tensor:
        """The rotated weight."""
        return self._rotate(weight, multiplier)


OFTInfModule = OFTModule


class OFTNetwork(AdapterNetwork):
    """OFT modules of a U-Net; text encoders have none."""

    UNET_TARGET_REPLACE_MODULE_ATTN_ONLY: ClassVar[list[str]] = ["CrossAttention"]
    UNET_TARGET_REPLACE_MODULE_ALL_LINEAR: ClassVar[list[str]] = ["Transformer2DModel"]
    UNET_TARGET_REPLACE_MODULE_CONV2D_3X3: ClassVar[list[str]] = ["ResnetBlock2D", "Downsample2D", "Upsample2D"]
    OFT_PREFIX_UNET = "oft_unet"

    def __init__(
        self,
        text_encoder: Any,
        unet: nn.Module,
        multiplier: float = 1.0,
        dim: int = DEFAULT_DIM,
        alpha: float | Tensor | None = DEFAULT_ALPHA,
        enable_all_linear: bool = False,
        enable_conv: bool = False,
        module_class: type = OFTModule,
        varbose: bool = False,
    ) -> None:
        """
        Args:
            text_encoder: not used.
            dim: blocks of every layer; alpha: bound of the rotations.
            enable_all_linear: every linear layer of the transformers, not only attention.
            enable_conv: resnets, down- and upsamplers too, with all their convolutions.
            varbose: list the modules.
        """
        super().__init__(multiplier)
        self.dim, self.alpha = dim, alpha
        targets = list(self.UNET_TARGET_REPLACE_MODULE_ATTN_ONLY)
        if enable_all_linear:
            targets = list(self.UNET_TARGET_REPLACE_MODULE_ALL_LINEAR)
        if enable_conv:
            targets += self.UNET_TARGET_REPLACE_MODULE_CONV2D_3X3

        def is_target(layer: nn.Module) -> bool:
            kind = type(layer).__name__
            return "Linear" in kind or ("Conv2d" in kind and (enable_conv or tuple(layer.kernel_size) == (1, 1)))

        found = find_layers(unet, self.OFT_PREFIX_UNET, targets, is_target)
        self.unet_loras = [module_class(name, layer, multiplier, dim, alpha) for name, layer in found]
        self.check_names()
        log.info("OFT: %d modules, %d blocks each, bound %s", len(self.unet_loras), dim, float(alpha or 0))
        if varbose:
            log.info("modules: %s", ", ".join(adapter.lora_name for adapter in self.adapters))

    @property
    def unet_ofts(self) -> list[Any]:
        """The adapters."""
        return self.unet_loras

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Take over the layers' forwards.

        Raises:
            UserError: only the text encoder is to be trained.
        """
        if not apply_unet:
            raise UserError("OFT has no modules in text encoders", "leave out --network_train_text_encoder_only")
        super().apply_to(text_encoder, unet, apply_text_encoder, apply_unet)

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors under this U-Net's names, whichever of the naming styles it has."""
        return names.convert_if_needed(weights, [adapter.lora_name for adapter in self.unet_loras])

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """One optimizer group and its description; None = the optimizer's own rate."""
        return self.optimizer_groups([Part("unet", self.unet_loras, unet_lr, None, default_lr)])


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> OFTNetwork:
    """A new network for training.

    Args:
        network_dim: blocks of every layer (None = 4); network_alpha: bound of the rotations (None = 1).
        kwargs: `enable_all_linear`, `enable_conv`: true or false.

    Raises:
        UserError: a layer's outputs do not fall into that many blocks.
    """
    if neuron_dropout or kwargs.get("dropout"):
        warn_once("OFT has no dropout: --network_dropout has no effect")
    creation.warn_unknown(kwargs, ARGUMENTS, "in networks.oft")
    dim = DEFAULT_DIM if network_dim is None else int(network_dim)
    alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
    if alpha >= 1:
        warn_once(f"--network_alpha {alpha:g} hardly bounds OFT's rotations; 1e-3 is usual")
    return OFTNetwork(
        text_encoder,
        unet,
        multiplier,
        dim,
        alpha,
        enable_all_linear=_flag(kwargs, "enable_all_linear"),
        enable_conv=_flag(kwargs, "enable_conv"),
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
) -> tuple[OFTNetwork, dict[str, Tensor]]:
    """A network with the blocks, bound and targets of a file; its values are for the caller to load or merge.

    Returns:
        The network, and the file's tensors under the network's names.

    Raises:
        UserError: the file is of another family or method.
    """
    source = str(file) if file is not None else "the network"
    weights = dict(weights_sd) if weights_sd is not None else reading.read_network(str(file))
    creation.warn_unknown(kwargs, (), "with a file")
    weights = names.convert_if_needed(weights, names.unet_names(unet))
    is_own = re.compile(r"^oft_unet_.*\.oft_blocks$").search
    blocks = next((value for key, value in weights.items() if is_own(key)), None)
    if blocks is None:
        raise UserError(f"{source} is {files.kind_of(weights)}", "networks.oft reads files with oft_unet_*.oft_blocks")
    alpha = next((value for key, value in weights.items() if key.endswith(".alpha")), None)
    rest = list(_outside_attention(weights))
    network = OFTNetwork(
        text_encoder,
        unet,
        multiplier,
        blocks.shape[0],
        alpha,
        enable_all_linear=any(_is_transformer_linear(name) for name in rest),
        enable_conv=any(not _is_transformer_linear(name) for name in rest),
    )
    files.check_match(weights, network.adapters, source)
    return network, weights


def _outside_attention(weights: Mapping[str, Tensor]) -> Iterator[str]:
    return (name for name in files.group_by_module(weights) if not re.search(r"_attn[12]_to_", name))


def _is_transformer_linear(name: str) -> bool:
    return re.search(r"_ff_net_|_proj_(in|out)$", name) is not None


def _flag(kwargs: Mapping[str, Any], key: str) -> bool:
    """A switch of `--network_args`; a word that is neither true nor false counts as true, with a warning."""
    text = str(kwargs.get(key, "")).strip().lower()
    if text not in (*_TRUE, *_FALSE):
        warn_once(f"network argument {key}={kwargs[key]} is neither true nor false and counts as true")
    return text not in _FALSE
