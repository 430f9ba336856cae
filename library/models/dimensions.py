"""Sizes of a model, read from the shapes in its file; and which family a file belongs to.

What shapes cannot say is constant: 8 heads in SD 1.x, heads of 64 everywhere else, 32 norm groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from library.messages import UserError
from library.models.key_maps import CLIP_PREFIX, OPENCLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from library.models.unet_config import CROSS_DOWN, PLAIN_DOWN, SdxlUNetConfig, UNetConfig

Shapes = Mapping[str, Sequence[int]]
Kind = Literal["sd1", "sd2", "sdxl"]

HEAD_SIZE = 64
KIND_NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}


@dataclass(frozen=True)
class TextDimensions:
    """A CLIP text encoder."""

    width: int
    layers: int
    intermediate: int
    vocabulary: int = 49408
    positions: int = 77
    activation: str = "quick_gelu"
    projection: int | None = None


@dataclass(frozen=True)
class VaeDimensions:
    """An AutoencoderKL."""

    block_out_channels: tuple[int, ...]
    latent_channels: int = 4
    layers_per_block: int = 2
    norm_num_groups: int = 32


def kind_of(shapes: Shapes) -> Kind:
    """The family of a Stability file, from its tensors.

    Raises:
        UserError: no supported family; names what the tensors look like (without the file's path).
    """
    if any(key.startswith("conditioner.embedders.1.") for key in shapes):
        kind: Kind = "sdxl"
    elif any(key.startswith(OPENCLIP_PREFIX) for key in shapes):
        kind = "sd2"
    elif any(key.startswith(CLIP_PREFIX) for key in shapes):
        kind = "sd1"
    else:
        raise UserError(f"it is {_other_kind(shapes)}", "give a Stable Diffusion 1.x, 2.x or XL checkpoint")
    first = shapes.get(UNET_PREFIX + "input_blocks.0.0.weight")
    if first is not None and first[1] != 4:
        what = "an inpainting model" if first[1] == 9 else f"a model with {first[1]} input channels"
        raise UserError(f"it is {what} of {KIND_NAMES[kind]}", "give a plain text-to-image checkpoint")
    if ("edm_mean" in shapes and "edm_std" in shapes) or "edm_vpred.sigma_max" in shapes:
        raise UserError("it is an EDM model", "give a checkpoint with epsilon or v-prediction")
    return kind


def _other_kind(shapes: Shapes) -> str:
    """A name for a file that is no supported model, as far as its keys tell."""
    signs = (
        ("conditioner.embedders.0.model.", "the SDXL refiner, which is not supported"),
        ("double_blocks.", "a FLUX model"),
        ("model.diffusion_model.double_blocks.", "a FLUX model"),
        ("joint_blocks.", "a Stable Diffusion 3 model"),
        ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 model"),
        ("control_model.", "a ControlNet"),
        ("lora_", "a LoRA, not a model"),
        ("lycoris_", "a LyCORIS network, not a model"),
        (UNET_PREFIX, "a U-Net without a text encoder"),
        (VAE_PREFIX, "a VAE alone"),
        ("encoder.", "a VAE alone"),
        ("text_model.", "a text encoder alone"),
        ("down_blocks.", "a diffusers U-Net alone"),
        ("clip_l", "an SDXL embedding"),
        ("emb_params", "an embedding"),
        ("string_to_param", "an embedding"),
    )
    for prefix, name in signs:
        if any(key.startswith(prefix) for key in shapes):
            return name
    return "no Stable Diffusion model (none of its tensors has a known name)"


def _indices(keys: Sequence[str] | Mapping[str, object], pattern: str) -> list[int]:
    return sorted({int(m.group(1)) for m in (re.match(pattern, key) for key in keys) if m})


@dataclass(frozen=True)
class _Levels:
    """What both families' U-Nets have in common, as the shapes in a Stability file show it."""

    widths: tuple[int, ...]
    layers: int
    depths: tuple[int, ...]
    context: int
    linear_projections: bool

    @property
    def block_types(self) -> tuple[str, ...]:
        return tuple(CROSS_DOWN if depth else PLAIN_DOWN for depth in self.depths)


def _levels(shapes: Shapes, kind: Kind) -> _Levels:
    unet = {k[len(UNET_PREFIX) :]: v for k, v in shapes.items() if k.startswith(UNET_PREFIX)}
    downs = _indices(unet, r"input_blocks\.(\d+)\.0\.op\.")
    resnets = _indices(unet, r"input_blocks\.(\d+)\.0\.in_layers\.")
    contexts = [s[1] for k, s in unet.items() if k.endswith("attn2.to_k.weight")]
    projections = [s for k, s in unet.items() if k.endswith("proj_in.weight")]
    levels, stride = len(downs) + 1, downs[0] if downs else 0
    starts = [stride * i + 1 for i in range(levels)]
    wanted = [start + j for start in starts for j in range(stride - 1)]
    if not contexts or not projections or downs != [stride * (i + 1) for i in range(levels - 1)] or resnets != wanted:
        raise UserError(f"its U-Net is not built like that of {KIND_NAMES[kind]}", "give a complete checkpoint")
    return _Levels(
        widths=tuple(unet.get(f"input_blocks.{start}.0.out_layers.3.weight", (64,))[0] for start in starts),
        layers=stride - 1,
        depths=tuple(
            len(_indices(unet, rf"input_blocks\.{start}\.1\.transformer_blocks\.(\d+)\.")) for start in starts
        ),
        context=contexts[0],
        linear_projections=len(projections[0]) == 2,
    )


def unet_config(shapes: Shapes, kind: Kind) -> UNetConfig:
    """Sizes of an SD 1.x or 2.x U-Net from a Stability file's shapes.

    Raises:
        UserError: the structure is not that of the family.
    """
    levels = _levels(shapes, kind)
    return UNetConfig(
        sample_size=64,
        block_out_channels=levels.widths,
        layers_per_block=levels.layers,
        down_block_types=levels.block_types,
        cross_attention_dim=levels.context,
        attention_head_dim=8 if kind == "sd1" else heads_of(levels.widths),
        use_linear_projection=levels.linear_projections,
        # SD 2.x overflows in float16 otherwise; without float16 the flag changes nothing.
        upcast_attention=kind == "sd2",
    )


def sdxl_unet_config(shapes: Shapes) -> SdxlUNetConfig:
    """Sizes of an SDXL U-Net from a Stability file's shapes.

    Raises:
        UserError: the structure is not that of the family.
    """
    levels = _levels(shapes, "sdxl")
    adm = shapes.get(UNET_PREFIX + "label_emb.0.0.weight")
    if adm is None:
        raise UserError("its U-Net has no embedding of sizes (label_emb)", "give a complete SDXL checkpoint")
    return SdxlUNetConfig(
        block_out_channels=levels.widths,
        layers_per_block=levels.layers,
        down_block_types=levels.block_types,
        transformer_layers_per_block=tuple(depth or 1 for depth in levels.depths),
        attention_head_dim=heads_of(levels.widths),
        cross_attention_dim=levels.context,
        projection_class_embeddings_input_dim=adm[1],
    )


def heads_of(widths: Sequence[int]) -> tuple[int, ...]:
    """Attention heads per level of SD 2.x and SDXL."""
    return tuple(max(1, width // HEAD_SIZE) for width in widths)


def clip_dimensions(shapes: Shapes, prefix: str = CLIP_PREFIX, activation: str = "quick_gelu") -> TextDimensions:
    """Sizes of a text encoder with transformers' names below `prefix`.

    Raises:
        UserError: it is not there.
    """
    embeddings = prefix + "text_model.embeddings."
    layers = _indices(shapes, re.escape(prefix) + r"text_model\.encoder\.layers\.(\d+)\.")
    try:
        vocabulary, width = shapes[embeddings + "token_embedding.weight"]
        positions = shapes[embeddings + "position_embedding.weight"][0]
        intermediate = shapes[f"{prefix}text_model.encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise UserError(f"its text encoder lacks {error.args[0]}", "give a complete checkpoint") from error
    return TextDimensions(width, layers[-1] + 1, intermediate, vocabulary, positions, activation)


def openclip_dimensions(shapes: Shapes, prefix: str = OPENCLIP_PREFIX, unused_layers: int = 1) -> TextDimensions:
    """Sizes of a text encoder in OpenCLIP layout below `prefix`.

    Args:
        unused_layers: blocks at the end that the family does not use (SD 2.x: 1, SDXL: 0).

    Raises:
        UserError: it is not there.
    """
    layers = _indices(shapes, re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    try:
        vocabulary, width = shapes[prefix + "token_embedding.weight"]
        positions = shapes[prefix + "positional_embedding"][0]
        intermediate = shapes[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0]
    except KeyError as error:
        raise UserError(f"its text encoder lacks {error.args[0]}", "give a complete checkpoint") from error
    count = layers[-1] + 1 - unused_layers
    return TextDimensions(width, count, intermediate, vocabulary, positions, "gelu")


def projection_width(shapes: Shapes, prefix: str) -> int:
    """Width of the pooled output of an OpenCLIP text encoder (SDXL's second; other families do not use it).

    Raises:
        UserError: the projection is not there.
    """
    matrix, linear = shapes.get(prefix + "text_projection"), shapes.get(prefix + "text_projection.weight")
    if matrix is not None:
        return matrix[1]
    if linear is None:
        raise UserError(f"its text encoder lacks {prefix}text_projection", "give a complete checkpoint")
    return linear[0]


def vae_dimensions(shapes: Shapes, prefix: str = VAE_PREFIX) -> VaeDimensions:
    """Sizes of a VAE with Stability names below `prefix`.

    Raises:
        UserError: it is not there.
    """
    levels = _indices(shapes, re.escape(prefix) + r"encoder\.down\.(\d+)\.")
    blocks = _indices(shapes, re.escape(prefix) + r"encoder\.down\.0\.block\.(\d+)\.")
    try:
        widths = tuple(shapes[f"{prefix}encoder.down.{i}.block.0.conv1.weight"][0] for i in levels)
        latent_channels = shapes[prefix + "post_quant_conv.weight"][0]
    except KeyError as error:
        raise UserError(f"its VAE lacks {error.args[0]}", "give a complete checkpoint, or another VAE") from error
    if not widths:
        raise UserError("it holds no VAE", "give a complete checkpoint")
    return VaeDimensions(widths, latent_channels, len(blocks))
