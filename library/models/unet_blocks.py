"""The levels of the SD 1.x/2.x U-Net, which ControlNets share.

In every level attentions come before resnets: the order of modules decides the order in network files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from library.models.layers import Downsample2D, ResnetBlock2D, Transformer2DModel, Upsample2D, run_segment
from library.models.unet_config import CROSS_DOWN, UNetConfig


class DownBlock2D(nn.Module):
    """Level of the down path: resnets, then a downsampler unless it is the last level."""

    has_cross_attention = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        add_downsample: bool = True,
        *,
        layers: int = 2,
        time_embed_dim: int = 1280,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        resnet = {"time_embed_dim": time_embed_dim, "norm_num_groups": norm_num_groups}
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if j == 0 else out_channels, out_channels, **resnet) for j in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, out_channels)]) if add_downsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """-> (result, every layer's result for the skip connections)."""
        skips = []
        for resnet in self.resnets:
            hidden_states = run_segment(resnet, hidden_states, temb)
            skips.append(hidden_states)
        return _downsample(self.downsamplers, hidden_states, skips)


class CrossAttnDownBlock2D(nn.Module):
    """Level of the down path with attention after every resnet."""

    has_cross_attention = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        add_downsample: bool = True,
        cross_attention_dim: int = 1280,
        attn_num_head_channels: int = 1,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        *,
        layers: int = 2,
        depth: int = 1,
        time_embed_dim: int = 1280,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        resnet = {"time_embed_dim": time_embed_dim, "norm_num_groups": norm_num_groups}
        attention = _attention_arguments(
            out_channels, attn_num_head_channels, cross_attention_dim, use_linear_projection, depth, norm_num_groups
        )
        self.attentions = nn.ModuleList(
            Transformer2DModel(**attention, upcast_attention=upcast_attention) for _ in range(layers)
        )
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if j == 0 else out_channels, out_channels, **resnet) for j in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, out_channels)]) if add_downsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """-> (result, every layer's result for the skip connections).

        `encoder_hidden_states`: text (B, L, D) for all attentions, or (attentions, B, L, D) with one entry for each.
        """
        skips = []
        states = states_per_attention(encoder_hidden_states, len(self.attentions))
        for resnet, attention, context in zip(self.resnets, self.attentions, states, strict=True):
            hidden_states = run_segment(resnet, hidden_states, temb)
            hidden_states = run_segment(attention, hidden_states, context, None, False)[0]
            skips.append(hidden_states)
        return _downsample(self.downsamplers, hidden_states, skips)


class UNetMidBlock2DCrossAttn(nn.Module):
    """Resnet, attention, resnet at the lowest resolution; its attention is never upcast."""

    has_cross_attention = True

    def __init__(
        self,
        in_channels: int,
        attn_num_head_channels: int = 1,
        cross_attention_dim: int = 1280,
        use_linear_projection: bool = False,
        *,
        depth: int = 1,
        time_embed_dim: int = 1280,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        resnet = {"time_embed_dim": time_embed_dim, "norm_num_groups": norm_num_groups}
        attention = _attention_arguments(
            in_channels, attn_num_head_channels, cross_attention_dim, use_linear_projection, depth, norm_num_groups
        )
        self.attentions = nn.ModuleList([Transformer2DModel(**attention)])
        self.resnets = nn.ModuleList(ResnetBlock2D(in_channels, in_channels, **resnet) for _ in range(2))

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = run_segment(self.resnets[0], hidden_states, temb)
        (context,) = states_per_attention(encoder_hidden_states, 1)
        hidden_states = run_segment(self.attentions[0], hidden_states, context, None, False)[0]
        return run_segment(self.resnets[1], hidden_states, temb)


class UpBlock2D(nn.Module):
    """Level of the up path: skip connections concatenated, resnets, an upsampler unless it is the last level."""

    has_cross_attention = False

    def __init__(
        self,
        in_channels: int,
        prev_output_channel: int,
        out_channels: int,
        add_upsample: bool = True,
        *,
        layers: int = 3,
        time_embed_dim: int = 1280,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        resnet = {"time_embed_dim": time_embed_dim, "norm_num_groups": norm_num_groups}
        widths = _up_widths(in_channels, prev_output_channel, out_channels, layers)
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, **resnet) for width in widths)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels, out_channels)]) if add_upsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states_tuple: tuple[torch.Tensor, ...],
        temb: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        upsample_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """`res_hidden_states_tuple`: one skip entry per resnet, taken from its end."""
        for resnet, skip in zip(self.resnets, reversed(res_hidden_states_tuple), strict=True):
            hidden_states = run_segment(resnet, torch.cat([hidden_states, skip], dim=1), temb)
        return hidden_states if self.upsamplers is None else self.upsamplers[0](hidden_states, upsample_size)


class CrossAttnUpBlock2D(nn.Module):
    """Level of the up path with attention after every resnet."""

    has_cross_attention = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        prev_output_channel: int,
        attn_num_head_channels: int = 1,
        cross_attention_dim: int = 1280,
        add_upsample: bool = True,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        *,
        layers: int = 3,
        depth: int = 1,
        time_embed_dim: int = 1280,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        resnet = {"time_embed_dim": time_embed_dim, "norm_num_groups": norm_num_groups}
        attention = _attention_arguments(
            out_channels, attn_num_head_channels, cross_attention_dim, use_linear_projection, depth, norm_num_groups
        )
        widths = _up_widths(in_channels, prev_output_channel, out_channels, layers)
        self.attentions = nn.ModuleList(
            Transformer2DModel(**attention, upcast_attention=upcast_attention) for _ in range(layers)
        )
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, **resnet) for width in widths)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels, out_channels)]) if add_upsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states_tuple: tuple[torch.Tensor, ...],
        temb: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        upsample_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """`res_hidden_states_tuple`: one skip entry per resnet, taken from its end.

        `encoder_hidden_states`: see `CrossAttnDownBlock2D.forward`.
        """
        states = states_per_attention(encoder_hidden_states, len(self.attentions))
        layers = zip(self.resnets, self.attentions, reversed(res_hidden_states_tuple), states, strict=True)
        for resnet, attention, skip, context in layers:
            hidden_states = run_segment(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            hidden_states = run_segment(attention, hidden_states, context, None, False)[0]
        return hidden_states if self.upsamplers is None else self.upsamplers[0](hidden_states, upsample_size)


def states_per_attention(states: torch.Tensor | None, count: int) -> Sequence[torch.Tensor | None]:
    """Text states for each of `count` attentions: entries of a leading axis, or the same (B, L, D) for all."""
    if states is None or states.ndim == 3:
        return [states] * count
    return states.unbind(0)


def _attention_arguments(
    channels: int, heads: int, cross_attention_dim: int, linear: bool, depth: int, groups: int
) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": channels // heads,
        "in_channels": channels,
        "cross_attention_dim": cross_attention_dim,
        "use_linear_projection": linear,
        "num_transformer_layers": depth,
        "norm_num_groups": groups,
    }


def _up_widths(in_channels: int, previous: int, out_channels: int, layers: int) -> list[int]:
    """Input width of each resnet of an up level; the last skip entry comes from the next shallower level."""
    return [
        (previous if j == 0 else out_channels) + (in_channels if j == layers - 1 else out_channels)
        for j in range(layers)
    ]


def _downsample(
    downsamplers: nn.ModuleList | None, hidden_states: torch.Tensor, skips: list[torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    if downsamplers is not None:
        hidden_states = downsamplers[0](hidden_states)
        skips.append(hidden_states)
    return hidden_states, tuple(skips)


def _level_arguments(config: UNetConfig, layers: int) -> dict[str, Any]:
    return {
        "layers": layers,
        "time_embed_dim": config.time_embed_dim,
        "norm_num_groups": config.norm_num_groups,
    }


def _attention_level_arguments(config: UNetConfig, level: int) -> dict[str, Any]:
    return {
        "attn_num_head_channels": config.heads[level],
        "cross_attention_dim": config.cross_attention_dim,
        "use_linear_projection": config.use_linear_projection,
        "upcast_attention": config.upcast_attention,
        "depth": config.depths[level],
    }


def down_blocks(config: UNetConfig) -> list[nn.Module]:
    blocks = []
    widths = config.block_out_channels
    common = _level_arguments(config, config.layers_per_block)
    for level, kind in enumerate(config.down_block_types):
        plain = (widths[max(level - 1, 0)], widths[level], level < len(widths) - 1)
        if kind == CROSS_DOWN:
            blocks.append(CrossAttnDownBlock2D(*plain, **_attention_level_arguments(config, level), **common))
        else:
            blocks.append(DownBlock2D(*plain, **common))
    return blocks


def up_blocks(config: UNetConfig) -> list[nn.Module]:
    blocks = []
    widths = config.block_out_channels
    common = _level_arguments(config, config.layers_per_block + 1)
    for level in reversed(range(len(widths))):
        common["add_upsample"] = level > 0
        shape = {
            "in_channels": widths[max(level - 1, 0)],
            "out_channels": widths[level],
            "prev_output_channel": widths[min(level + 1, len(widths) - 1)],
        }
        if config.down_block_types[level] == CROSS_DOWN:
            blocks.append(CrossAttnUpBlock2D(**shape, **_attention_level_arguments(config, level), **common))
        else:
            blocks.append(UpBlock2D(**shape, **common))
    return blocks
