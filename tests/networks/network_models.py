"""Small and full-size models for the network tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library.models.dimensions import TextDimensions
from library.models.text_encoders import empty_text_encoder, restore_buffers, text_config
from library.models.unet_config import UNetConfig
from library.models.unet_sd import from_config

FULL_UNETS = {
    "sd15": UNetConfig(cross_attention_dim=768),
    "sd21": UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20)),
    "sd21_linear_projection": UNetConfig(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
}
_OPENCLIP = TextDimensions(1024, 23, 4096, activation="gelu")
FULL_TEXT = {"sd15": TextDimensions(768, 12, 3072), "sd21": _OPENCLIP, "sd21_linear_projection": _OPENCLIP}
WIDTH = 32


def small_unet(**changes: Any) -> nn.Module:
    """A frozen U-Net of SD 1.x shape with random weights."""
    values = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": WIDTH, "attention_head_dim": 4, **changes}
    torch.manual_seed(0)
    return from_config(UNetConfig(**values)).requires_grad_(False)


def small_text_encoder(layers: int = 2, width: int = WIDTH) -> nn.Module:
    """A frozen CLIP text encoder with random weights."""
    encoder = empty_text_encoder(text_config(TextDimensions(width, layers, 2 * width, vocabulary=100)))
    encoder.to_empty(device="cpu")
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    restore_buffers(encoder, "cpu")
    return encoder.requires_grad_(False)


def predict(unet: nn.Module, rows: int = 2, size: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One call with fixed inputs: (rows, 4, size, size)."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(rows, 4, size, size, generator=generator).to(dtype)
    text = torch.randn(rows, 7, WIDTH, generator=generator).to(dtype)
    return unet(latents, torch.arange(rows) * 300 + 1, text).sample


def randomize(network: nn.Module, std: float = 0.05) -> nn.Module:
    """Give every parameter of a network a value, so that it has an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return network


def make_layer(kind: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The layer of a recorded case: `linear`, `conv1` or `conv3` (stride 2, padding 1)."""
    weight = tensors["org.weight"]
    if kind == "linear":
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
    elif kind == "conv1":
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride=2, padding=1)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(tensors["org.bias"])
    return layer.requires_grad_(False)
