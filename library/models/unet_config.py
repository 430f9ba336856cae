"""Dimensions of a U-Net, in the names of diffusers' `unet/config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from library.messages import UserError
from library.models.layers import RESNET_EPS

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
ADM_IN_CHANNELS = 2816
SIZE_EMBED_DIM = 256
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"


Record = TypeVar("Record", bound="UNetConfig")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SdxlUNetConfig(UNetConfig):
    """The dimensions of an SDXL U-Net.

    Attributes:
        projection_class_embeddings_input_dim: width of the vector y: pooled text and six embedded sizes.
        freq_shift: of the time embedding's frequencies; models in use have 0.
    """

    sample_size: int = 128
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    down_block_types: tuple[str, ...] = (PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN)
    transformer_layers_per_block: int | tuple[int, ...] = (1, 2, 10)
    attention_head_dim: int | tuple[int, ...] = (5, 10, 20)
    cross_attention_dim: int = 2048
    use_linear_projection: bool = True
    projection_class_embeddings_input_dim: int = ADM_IN_CHANNELS
    freq_shift: float = 0.0

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text."""
        return self.projection_class_embeddings_input_dim - 6 * SIZE_EMBED_DIM

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' `unet/config.json`."""
        return UNetConfig.to_diffusers(self) | _SDXL | {"freq_shift": self.freq_shift}


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
_SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_EMBED_DIM,
    "use_linear_projection": True,
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
    return _parse(config, UNetConfig, _FIXED, _ABSENT, "Stable Diffusion 1.x or 2.x")


def parse_sdxl_config(config: dict[str, Any]) -> SdxlUNetConfig:
    """diffusers' `unet/config.json` of an SDXL model as a record.

    Raises:
        UserError: a setting that the SDXL U-Net does not have.
    """
    fixed = {name: value for name, value in _FIXED.items() if name != "freq_shift"} | _SDXL
    absent = {name: value for name, value in _ABSENT.items() if name not in _SDXL}
    return _parse(config, SdxlUNetConfig, fixed, absent, "Stable Diffusion XL")


def _parse(
    config: dict[str, Any], kind: type[Record], fixed: dict[str, Any], absent: dict[str, Any], family: str
) -> Record:
    for name, value in (fixed | absent).items():
        if config.get(name, value) != value and not (name not in fixed and config[name] is None):
            raise UserError(
                f"the U-Net's config.json has {name} = {config[name]!r}, which {family} models do not have",
                f"use a {family} model",
            )
    values: dict[str, Any] = {f.name: config[f.name] for f in fields(kind) if config.get(f.name) is not None}
    if config.get("num_attention_heads") is not None:
        values["attention_head_dim"] = config["num_attention_heads"]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    record = kind(**values)
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


def _per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)
