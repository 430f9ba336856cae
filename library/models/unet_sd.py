"""The U-Net of SD 1.x and 2.x, with diffusers' key names.

The order of modules (attentions before resnets, middle block after the up blocks) decides the order of adapter
modules and parameter groups in files; it is part of the interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models.layers import (
    RESNET_EPS,
    SampleOutput,
    TimeEmbedding,
    Timesteps,
)
from library.models.unet_blocks import UNetMidBlock2DCrossAttn, down_blocks, up_blocks
from library.models.unet_config import CROSS_DOWN, PLAIN_DOWN, UNetConfig, parse_config
from library.models.unet_switches import UNetSwitches
from library.runtime.precision import cast_once


class UNet2DConditionModel(UNetSwitches):
    """U-Net of SD 1.x and 2.x.

    Args:
        sample_size: latent side, kept as an attribute; required.
        attention_head_dim: number of heads, one for all levels or one per level.
        cross_attention_dim: width of the context: 768 (SD 1.x), 1024 (SD 2.x).
        use_linear_projection, upcast_attention: see `Transformer2DModel`.
        others: as `UNetConfig`.
        ignored: settings of diffusers' config that have one value here.
    """

    def __init__(
        self,
        sample_size: int | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        cross_attention_dim: int = 1280,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        *,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN),
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        norm_num_groups: int = 32,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if sample_size is None:
            raise ValueError("sample_size must be given")
        self.config = UNetConfig(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple(down_block_types),
            transformer_layers_per_block=_frozen(transformer_layers_per_block),
            attention_head_dim=_frozen(attention_head_dim),
            cross_attention_dim=cross_attention_dim,
            use_linear_projection=bool(use_linear_projection),
            upcast_attention=bool(upcast_attention),
            norm_num_groups=norm_num_groups,
        )
        self.sample_size = sample_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        first = block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first)
        self.time_embedding = TimeEmbedding(first, self.config.time_embed_dim)
        self.down_blocks = nn.ModuleList(down_blocks(self.config))
        self.up_blocks = nn.ModuleList(up_blocks(self.config))
        self.mid_block = UNetMidBlock2DCrossAttn(
            block_out_channels[-1],
            self.config.heads[-1],
            cross_attention_dim,
            use_linear_projection,
            depth=self.config.depths[-1],
            time_embed_dim=self.config.time_embed_dim,
            norm_num_groups=norm_num_groups,
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, first, eps=RESNET_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
    ) -> SampleOutput | tuple[torch.Tensor]:
        """Predict noise or velocity.

        Args:
            sample: latents (B, in_channels, H, W), any H and W.
            timestep: number, 0-d tensor, or (1) or (B); fractions are kept.
            encoder_hidden_states: text (B, L, cross_attention_dim); or (attentions, B, L, cross_attention_dim) with
                an entry for each cross-attention in forward order (XTI: 16).
            class_labels: not used.
            return_dict: an object with `sample`, else a 1-tuple.
            down_block_additional_residuals: added to the skip connections (ControlNet), one each.
            mid_block_additional_residual: added to the middle block's output.
        """
        contexts = self._contexts(cast_once(encoder_hidden_states))
        temb = self._embed_time(timestep, sample)
        h = self.conv_in(sample)
        skips = [h]
        for block in self.down_blocks:
            h, entries = block(h, temb, next(contexts)) if block.has_cross_attention else block(h, temb)
            skips.extend(entries)
        if down_block_additional_residuals is not None:
            # Out of place: the last skip entry is also the middle block's input, which must stay as it is.
            skips = [skip + extra for skip, extra in zip(skips, down_block_additional_residuals, strict=True)]
        h = self.mid_block(h, temb, next(contexts))
        if mid_block_additional_residual is not None:
            h = h + mid_block_additional_residual
        h = self._up(h, skips, temb, contexts, sample.shape[-2:])
        h = self.conv_out(self.conv_act(self.conv_norm_out(h)))
        return SampleOutput(h) if return_dict else (h,)

    def _contexts(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """What each level with attention gets, in forward order: the states, or its share of a leading axis."""
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        counts = [len(block.attentions) for block in blocks if block.has_cross_attention]
        if states.ndim == 3:
            return iter([states] * len(counts))
        if len(states) != sum(counts):
            raise UserError(
                f"text states for {len(states)} layers, but this U-Net has {sum(counts)} cross-attentions",
                "XTI works with models that have the layers of SD 1.x and 2.x",
            )
        return iter(states.split(counts))

    def _embed_time(self, timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
        if not isinstance(timestep, torch.Tensor):
            wide = sample.device.type != "mps"
            kinds = (torch.float64 if wide else torch.float32, torch.int64 if wide else torch.int32)
            timestep = torch.tensor([timestep], dtype=kinds[isinstance(timestep, int)], device=sample.device)
        timesteps = timestep.to(sample.device).reshape(-1).expand(sample.shape[0])
        return self.time_embedding(self.time_proj(timesteps).to(self.dtype))

    def _up(
        self,
        h: torch.Tensor,
        skips: list[torch.Tensor],
        temb: torch.Tensor,
        contexts: Iterator[torch.Tensor],
        size: torch.Size,
    ) -> torch.Tensor:
        # Sides that do not halve evenly come back by interpolating to the size of the next skip entry.
        factor = 2 ** (len(self.up_blocks) - 1)
        uneven = any(side % factor for side in size)
        for block in self.up_blocks:
            count = len(block.resnets)
            entries, skips = tuple(skips[-count:]), skips[:-count]
            target = tuple(skips[-1].shape[-2:]) if uneven and skips else None
            if block.has_cross_attention:
                h = block(h, entries, temb, next(contexts), target)
            else:
                h = block(h, entries, temb, upsample_size=target)
        return h

    def checkpoint_segments(self) -> list[nn.Module]:
        """The parts that checkpointing recomputes, in the order in which they run."""
        segments: list[nn.Module] = []
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            resnets, attentions = list(block.resnets), list(getattr(block, "attentions", []))
            while resnets or attentions:
                segments += [queue.pop(0) for queue in (resnets, attentions) if queue]
        return segments


def _frozen(value: int | list[int] | tuple[int, ...]) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


def from_config(config: dict[str, Any] | UNetConfig) -> UNet2DConditionModel:
    """A U-Net of these dimensions with torch's initial weights (make it under `torch.device("meta")` to load)."""
    record = config if isinstance(config, UNetConfig) else parse_config(config)
    return UNet2DConditionModel(**asdict(record))
