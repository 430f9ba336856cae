"""The U-Net of SD 1.x and 2.x, with diffusers' key names.

The order of modules (attentions before resnets, middle block after the up blocks) decides the order of adapter
modules and parameter groups in files; it is part of the interface.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models.layers import (
    RESNET_EPS,
    CrossAttention,
    Downsample2D,
    ResnetBlock2D,
    SampleOutput,
    TimeEmbedding,
    Timesteps,
    Transformer2DModel,
    Upsample2D,
    run_segment,
    set_attention_backend,
)
from library.runtime.precision import cast_once

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """The dimensions of a U-Net, in the names of diffusers' config.json.

    Attributes:
        sample_size: latent side the model was made for; kept for writing it back.
        attention_head_dim: **number** of heads, one for all levels or one per level.
        cross_attention_dim: width of the context.
        down_block_types: per level `CrossAttnDownBlock2D` or `DownBlock2D`; the up path mirrors it.
        transformer_layers_per_block: transformer depth, one for all levels or one per level.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN)
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32

    @property
    def up_block_types(self) -> tuple[str, ...]:
        return tuple(CROSS_UP if kind == CROSS_DOWN else PLAIN_UP for kind in reversed(self.down_block_types))

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads per level."""
        return _per_level(self.attention_head_dim, len(self.block_out_channels))

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of transformer blocks per attention, per level."""
        return _per_level(self.transformer_layers_per_block, len(self.block_out_channels))

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' `unet/config.json`."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {
            "_class_name": "UNet2DConditionModel",
            **values,
            **_FIXED,
            "up_block_types": list(self.up_block_types),
        }


# What this U-Net cannot vary: any other value in a config.json is refused, because its numbers would differ.
_FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": RESNET_EPS,
}
_ABSENT = {
    "addition_embed_type": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


def parse_config(config: dict[str, Any]) -> UNetConfig:
    """diffusers' `unet/config.json` as a record.

    Raises:
        UserError: a setting that the SD 1.x/2.x U-Net does not have.
    """
    for name, value in (_FIXED | _ABSENT).items():
        if config.get(name, value) != value and not (name not in _FIXED and config[name] is None):
            raise UserError(
                f"the U-Net's config.json has {name} = {config[name]!r}, which SD 1.x/2.x models do not have",
                "use a Stable Diffusion 1.x or 2.x model",
            )
    values: dict[str, Any] = {k: config[k] for k in UNetConfig.__slots__ if config.get(k) is not None}
    if config.get("num_attention_heads") is not None:
        values["attention_head_dim"] = config["num_attention_heads"]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    record = UNetConfig(**values)
    _check(record, config.get("up_block_types"))
    return record


def _check(config: UNetConfig, up_block_types: list[str] | None) -> None:
    levels = len(config.block_out_channels)
    problem = None
    if len(config.down_block_types) != levels:
        problem = f"{levels} block_out_channels but {len(config.down_block_types)} down_block_types"
    elif set(config.down_block_types) - {CROSS_DOWN, PLAIN_DOWN}:
        problem = f"unknown down_block_types {sorted(set(config.down_block_types) - {CROSS_DOWN, PLAIN_DOWN})}"
    elif up_block_types is not None and tuple(up_block_types) != config.up_block_types:
        problem = "up_block_types do not mirror down_block_types"
    elif not isinstance(config.layers_per_block, int) or not isinstance(config.cross_attention_dim, int):
        problem = "layers_per_block and cross_attention_dim must be one number each"
    elif any(c % config.norm_num_groups for c in config.block_out_channels):
        problem = f"block_out_channels {config.block_out_channels} do not divide by {config.norm_num_groups} groups"
    elif any(c % h for c, h in zip(config.block_out_channels, config.heads, strict=True)):
        problem = f"block_out_channels {config.block_out_channels} do not divide by {config.heads} heads"
    if problem:
        raise UserError(f"the U-Net's config.json is not usable: {problem}", "use an unmodified model folder")


def from_config(config: dict[str, Any] | UNetConfig) -> UNet2DConditionModel:
    """A U-Net of these dimensions with torch's initial weights (make it under `torch.device("meta")` to load)."""
    record = config if isinstance(config, UNetConfig) else parse_config(config)
    return UNet2DConditionModel(**asdict(record))


def _per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


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
        """-> (result, every layer's result for the skip connections)."""
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            hidden_states = run_segment(resnet, hidden_states, temb)
            hidden_states = run_segment(attention, hidden_states, encoder_hidden_states, None, False)[0]
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
        hidden_states = run_segment(self.attentions[0], hidden_states, encoder_hidden_states, None, False)[0]
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
        """`res_hidden_states_tuple`: one skip entry per resnet, taken from its end."""
        layers = zip(self.resnets, self.attentions, reversed(res_hidden_states_tuple), strict=True)
        for resnet, attention, skip in layers:
            hidden_states = run_segment(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            hidden_states = run_segment(attention, hidden_states, encoder_hidden_states, None, False)[0]
        return hidden_states if self.upsamplers is None else self.upsamplers[0](hidden_states, upsample_size)


def _attention_arguments(
    channels: int, heads: int, cross_attention_dim: int, linear: bool, depth: int, groups: int
) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": channels // heads,
        "in_channels": channels,
        "cross_attention_dim": cross_attention_dim,
        "use_linear_projection": linear,
        "depth": depth,
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


class UNet2DConditionModel(nn.Module):
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
        self._checkpointing_interval = 0
        first = block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first)
        self.time_embedding = TimeEmbedding(first, self.config.time_embed_dim)
        self.down_blocks = nn.ModuleList(_down_blocks(self.config))
        self.up_blocks = nn.ModuleList(_up_blocks(self.config))
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

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.parameters()).device

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
            encoder_hidden_states: text (B, L, cross_attention_dim).
            class_labels: not used.
            return_dict: an object with `sample`, else a 1-tuple.
            down_block_additional_residuals: added to the skip connections (ControlNet), one each.
            mid_block_additional_residual: added to the middle block's output.
        """
        context = cast_once(encoder_hidden_states)
        temb = self._embed_time(timestep, sample)
        h = self.conv_in(sample)
        skips = [h]
        for block in self.down_blocks:
            h, entries = block(h, temb, context) if block.has_cross_attention else block(h, temb)
            skips.extend(entries)
        if down_block_additional_residuals is not None:
            # Out of place: the last skip entry is also the middle block's input, which must stay as it is.
            skips = [skip + extra for skip, extra in zip(skips, down_block_additional_residuals, strict=True)]
        h = self.mid_block(h, temb, context)
        if mid_block_additional_residual is not None:
            h = h + mid_block_additional_residual
        h = self._up(h, skips, temb, context, sample.shape[-2:])
        h = self.conv_out(self.conv_act(self.conv_norm_out(h)))
        return SampleOutput(h) if return_dict else (h,)

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
        context: torch.Tensor,
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
                h = block(h, entries, temb, context, target)
            else:
                h = block(h, entries, temb, upsample_size=target)
        return h

    def set_attention_backend(self, backend: str) -> None:
        """Set the backend of every attention layer (`library.runtime.attention.BACKENDS`)."""
        set_attention_backend(self, backend)

    def set_use_memory_efficient_attention(self, xformers: bool, mem_eff: bool) -> None:
        """Old switch: `xformers` picks that backend, anything else torch's own kernels."""
        CrossAttention.set_use_memory_efficient_attention(self, xformers, mem_eff)

    def set_use_sdpa(self, sdpa: bool) -> None:
        """Old switch: torch's own kernels, or the plain reference when switched off."""
        CrossAttention.set_use_sdpa(self, sdpa)

    def set_attention_slice(self, slice_size: Any) -> None:
        raise NotImplementedError("attention is not sliced; torch's kernels do not need it")

    def checkpoint_segments(self) -> list[nn.Module]:
        """The parts that checkpointing recomputes, in the order in which they run."""
        segments: list[nn.Module] = []
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            resnets, attentions = list(block.resnets), list(getattr(block, "attentions", []))
            while resnets or attentions:
                segments += [queue.pop(0) for queue in (resnets, attentions) if queue]
        return segments

    def enable_gradient_checkpointing(self, interval: int = 1) -> None:
        """Recompute every `interval`-th segment in the backward pass (training mode only)."""
        if interval < 1:
            raise ValueError("the interval must be at least 1")
        self._set_checkpointing(interval)

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations."""
        self._set_checkpointing(0)

    def set_gradient_checkpointing(self, value: bool = False) -> None:
        """Old switch: recompute every segment, or none."""
        self._set_checkpointing(1 if value else 0)

    def is_gradient_checkpointing(self) -> bool:
        """Whether any segment is recomputed."""
        return self._checkpointing_interval > 0

    def _set_checkpointing(self, interval: int) -> None:
        self._checkpointing_interval = interval
        for index, segment in enumerate(self.checkpoint_segments()):
            segment.checkpointed = interval > 0 and index % interval == 0

    def prepare_config(self, *args: Any, **kwargs: Any) -> None:
        """Kept for old callers: `config` is complete from the start."""


def _frozen(value: int | list[int] | tuple[int, ...]) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


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


def _down_blocks(config: UNetConfig) -> list[nn.Module]:
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


def _up_blocks(config: UNetConfig) -> list[nn.Module]:
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
