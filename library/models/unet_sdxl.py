"""The U-Net of SDXL, with Stability's key names (network files name their modules after them).

The tree of modules and its order are part of the interface: `input_blocks`, `middle_block`, `output_blocks`, each
entry a list of resnet, transformer and up- or downsampler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models.layers import (
    RESNET_EPS,
    Sinusoids,
    Transformer2DModel,
    Upsample2D,
    run_segment,
    timestep_embedding,
)
from library.models.unet_config import CROSS_DOWN, SIZE_EMBED_DIM, SdxlUNetConfig, parse_sdxl_config
from library.models.unet_switches import UNetSwitches
from library.runtime.precision import cast_once


class GroupNorm32(nn.GroupNorm):
    """Group norm that computes in float32 when its weights are float32, and gives back the input's format."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype != torch.float32 or x.dtype == torch.float32:
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)


class ResnetBlock2D(nn.Module):
    """Residual block with the time embedding added as a per-channel bias.

    Args:
        in_channels, out_channels: widths; `skip_connection` is a 1x1 convolution when they differ.
        time_embed_dim: width of the time embedding.
        norm_num_groups: groups of both norms.
    """

    checkpointed = False

    def __init__(
        self, in_channels: int, out_channels: int, *, time_embed_dim: int = 1280, norm_num_groups: int = 32
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.in_layers = nn.Sequential(
            GroupNorm32(norm_num_groups, in_channels, eps=RESNET_EPS),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(norm_num_groups, out_channels, eps=RESNET_EPS),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        equal = in_channels == out_channels
        self.skip_connection = nn.Identity() if equal else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """(B, in, H, W) and (B, time_embed_dim) -> (B, out, H, W)."""
        h = self.in_layers(x)
        h = h + self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample2D(nn.Module):
    """Halve both sides with a 3x3 convolution of stride 2."""

    checkpointed = False

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels
        self.op = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.op(hidden_states)


class SdxlUNet2DConditionModel(UNetSwitches):
    """U-Net of SDXL.

    Args:
        settings: fields of `SdxlUNetConfig`; those that are left out have the values of SDXL base.
            Others are ignored, as callers of old pass them.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        known = SdxlUNetConfig.__dataclass_fields__
        config = SdxlUNetConfig(**{name: value for name, value in settings.items() if name in known})
        self.config = config
        self.in_channels = config.in_channels
        self.out_channels = config.out_channels
        self.model_channels = first = config.block_out_channels[0]
        self.adm_in_channels = config.projection_class_embeddings_input_dim
        width = config.time_embed_dim
        self._sinusoids = Sinusoids(first, config.freq_shift)
        self.time_embed = nn.Sequential(nn.Linear(first, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = nn.Sequential(
            nn.Sequential(nn.Linear(self.adm_in_channels, width), nn.SiLU(), nn.Linear(width, width))
        )
        blocks, skips = _input_blocks(config)
        self.input_blocks = nn.ModuleList(blocks)
        last = len(config.block_out_channels) - 1
        channels = config.block_out_channels[last]
        self.middle_block = nn.ModuleList(
            [
                _resnet(config, channels, channels),
                _transformer(config, last),
                _resnet(config, channels, channels),
            ]
        )
        self.output_blocks = nn.ModuleList(_output_blocks(config, skips))
        self.out = nn.ModuleList(
            [
                GroupNorm32(config.norm_num_groups, first, eps=RESNET_EPS),
                nn.SiLU(),
                nn.Conv2d(first, config.out_channels, 3, padding=1),
            ]
        )

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Predict noise or velocity.

        Args:
            x: latents (B, in_channels, H, W); H and W multiples of 4 (pictures: of 32 pixels).
            timesteps: 0-d, (1) or (B).
            context: text (B, L, cross_attention_dim).
            y: pooled text and sizes (B, 2816), in the format of `x`; see `size_embeddings`.
            ignored: further keywords of old callers.

        Returns:
            (B, out_channels, H, W).

        Raises:
            UserError: sides that are no multiple of 4.
            ValueError: `y` of another batch or number format than `x`.
        """
        self._check_inputs(x, y)
        context = cast_once(context)
        emb = self._embed(x, timesteps, y)
        h, skips = x, []
        for block in self.input_blocks:
            h = _run(block, h, emb, context)
            skips.append(h)
        h = _run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = _run(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return _run(self.out, h.to(x.dtype), emb, context)

    def _check_inputs(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if x.shape[0] != y.shape[0] or x.dtype != y.dtype:
            raise ValueError(
                f"latents {tuple(x.shape)} {x.dtype} and size vector {tuple(y.shape)} {y.dtype} "
                "must have the same batch and number format"
            )
        multiple = 2 ** (len(self.config.block_out_channels) - 1)
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise UserError(
                f"a picture of {x.shape[-1] * 8}x{x.shape[-2] * 8} pixels does not fit SDXL's U-Net",
                f"use sides that are multiples of {8 * multiple}",
            )

    def _embed(self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        timesteps = timesteps.to(x.device).reshape(-1).expand(x.shape[0])
        return self.time_embed(self._sinusoids(timesteps).to(x.dtype)) + self.label_emb(y)

    def checkpoint_segments(self) -> list[nn.Module]:
        """The parts that checkpointing recomputes, in the order in which they run."""
        segments: list[nn.Module] = []
        for block in (*self.input_blocks, self.middle_block, *self.output_blocks):
            for module in block:
                if isinstance(module, Transformer2DModel):
                    segments.extend(module.transformer_blocks)
                elif isinstance(module, (ResnetBlock2D, Downsample2D, Upsample2D)):
                    segments.append(module)
        return segments


def _run(block: Iterable[nn.Module], h: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    for module in block:
        if isinstance(module, ResnetBlock2D):
            h = run_segment(module, h, emb)
        elif isinstance(module, Transformer2DModel):
            h = module(h, context, None, False)[0]
        else:
            h = run_segment(module, h)
    return h


def _resnet(config: SdxlUNetConfig, in_channels: int, out_channels: int) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out_channels,
        time_embed_dim=config.time_embed_dim,
        norm_num_groups=config.norm_num_groups,
    )


def _transformer(config: SdxlUNetConfig, level: int) -> Transformer2DModel:
    channels, heads = config.block_out_channels[level], config.heads[level]
    return Transformer2DModel(
        heads,
        channels // heads,
        channels,
        config.cross_attention_dim,
        use_linear_projection=True,
        upcast_attention=config.upcast_attention,
        num_transformer_layers=config.depths[level],
        norm_num_groups=config.norm_num_groups,
    )


def _level(config: SdxlUNetConfig, level: int, in_channels: int) -> nn.ModuleList:
    """Resnet to the level's width, and a transformer where the level has them."""
    modules: list[nn.Module] = [_resnet(config, in_channels, config.block_out_channels[level])]
    if config.down_block_types[level] == CROSS_DOWN:
        modules.append(_transformer(config, level))
    return nn.ModuleList(modules)


def _input_blocks(config: SdxlUNetConfig) -> tuple[list[nn.Module], list[int]]:
    """The blocks of the way down, and the width of each one's output."""
    channels = config.block_out_channels[0]
    blocks: list[nn.Module] = [nn.Sequential(nn.Conv2d(config.in_channels, channels, 3, padding=1))]
    skips = [channels]
    for level, width in enumerate(config.block_out_channels):
        for _ in range(config.layers_per_block):
            blocks.append(_level(config, level, channels))
            channels = width
            skips.append(channels)
        if level < len(config.block_out_channels) - 1:
            blocks.append(nn.Sequential(Downsample2D(channels, channels)))
            skips.append(channels)
    return blocks, skips


def _output_blocks(config: SdxlUNetConfig, skips: list[int]) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    channels, entries = config.block_out_channels[-1], list(skips)
    for level in reversed(range(len(config.block_out_channels))):
        for layer in range(config.layers_per_block + 1):
            block = _level(config, level, channels + entries.pop())
            channels = config.block_out_channels[level]
            if level > 0 and layer == config.layers_per_block:
                block.append(Upsample2D(channels, channels))
            blocks.append(block)
    return blocks


def size_embeddings(original_size: torch.Tensor, crop: torch.Tensor, target_size: torch.Tensor) -> torch.Tensor:
    """The part of the vector y that tells a picture's sizes.

    Args:
        original_size: (B, 2) height and width of the source picture.
        crop: (B, 2) top and left of what is shown of it.
        target_size: (B, 2) height and width of what is shown.

    Returns:
        (B, 6 * 256) in float32, on the inputs' device; the vector y is the pooled text followed by it.
    """
    numbers = torch.cat([original_size, crop, target_size], dim=1)
    return timestep_embedding(numbers.reshape(-1), SIZE_EMBED_DIM).reshape(len(numbers), -1)


def from_config(config: dict[str, Any] | SdxlUNetConfig) -> SdxlUNet2DConditionModel:
    """A U-Net of these dimensions with torch's initial weights (make it under `torch.device("meta")` to load)."""
    record = config if isinstance(config, SdxlUNetConfig) else parse_sdxl_config(config)
    return SdxlUNet2DConditionModel(**asdict(record))
