"""The VAE: diffusers' AutoencoderKL behind a lazy import, its files of every kind, and batched coding.

Importing diffusers' models takes seconds, so it happens when the first VAE is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models.assembly import Part, fill, shapes_of
from library.models.checkpoint import Checkpoint, open_checkpoint
from library.models.dimensions import VaeDimensions, vae_dimensions
from library.models.folders import open_part, resolve_folder
from library.models.key_maps import VAE_PREFIX, Entry, modern_vae_key, vae_entries


def vae_config(dimensions: VaeDimensions, scaling_factor: float) -> dict[str, Any]:
    """`config.json` of a VAE of these sizes."""
    levels = len(dimensions.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(dimensions.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": dimensions.latent_channels,
        "layers_per_block": dimensions.layers_per_block,
        "norm_num_groups": dimensions.norm_num_groups,
        "out_channels": 3,
        "sample_size": 256,
        "scaling_factor": scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def empty_vae(config: Mapping[str, Any]) -> nn.Module:
    """An AutoencoderKL without memory (meta device)."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config)).eval()


def stability_vae_part(checkpoint: Checkpoint, scaling_factor: float, dtype: torch.dtype | None) -> Part:
    """The VAE of a Stability file (a full model, or a VAE alone without prefix), ready to fill."""
    prefix = VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in checkpoint.tensors) else ""
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    dimensions = vae_dimensions(shapes, prefix)
    module = empty_vae(vae_config(dimensions, scaling_factor))
    entries = vae_entries(
        shapes_of(module),
        levels=len(dimensions.block_out_channels),
        layers=dimensions.layers_per_block,
        prefix=prefix,
    )
    return Part("VAE", module, entries, dtype)


def diffusers_vae_part(checkpoint: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype | None) -> Part:
    """The VAE of a diffusers folder or file, with attention names of any diffusers version, ready to fill."""
    module = empty_vae(config)
    ours = shapes_of(module)
    entries = []
    for key in checkpoint.tensors:
        name = key if key in ours else modern_vae_key(key)
        if name in ours:
            is_matrix = len(ours[name]) == 2 and len(checkpoint.tensors[key].shape) == 4
            entries.append(Entry(key, (name,), "linear_to_conv1x1" if is_matrix else "identity"))
    found = {entry.module_keys[0] for entry in entries}
    entries += [Entry(key, (key,)) for key in ours if key not in found]
    return Part("VAE", module, entries, dtype)


def load_vae(
    source: str | Path,
    *,
    scaling_factor: float = 0.18215,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Open a VAE: a file in Stability or diffusers names (alone or inside a full model), a folder, or a hub id.

    Args:
        source: path or hub id; a folder is a VAE's own or a whole model's with the subfolder `vae`.
        scaling_factor: written into the config when the source has none.
        dtype: of the weights; None keeps float32 for files, as the file has them for folders.
        device: where the weights go.

    Raises:
        UserError: not there, or no VAE.
    """
    path = Path(source)
    if path.is_file():
        part, checkpoint = _file_part(path, scaling_factor, dtype or torch.float32)
    else:
        folder = resolve_folder(source, parts=("vae",), what="VAE")
        folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
        config, checkpoint = open_part(folder)
        part = diffusers_vae_part(checkpoint, config, dtype)
    try:
        fill(checkpoint, [part], device=device)
    except KeyError as error:
        raise UserError(f"{source} is no VAE ({error})", "give a VAE file, folder or hub id") from error
    return part.module


def _file_part(path: Path, scaling_factor: float, dtype: torch.dtype) -> tuple[Part, Checkpoint]:
    checkpoint = open_checkpoint(path)
    if any(".down_blocks." in key and key.startswith("encoder.") for key in checkpoint.tensors):
        return diffusers_vae_part(checkpoint, _config_beside(path, checkpoint, scaling_factor), dtype), checkpoint
    try:
        return stability_vae_part(checkpoint, scaling_factor, dtype), checkpoint
    except UserError as error:
        raise UserError(f"{path} is no VAE: {error.problem}", error.remedy) from error


def _config_beside(path: Path, checkpoint: Checkpoint, scaling_factor: float) -> dict[str, Any]:
    """config.json next to a diffusers file, else the sizes of its tensors."""
    beside = path.parent / "config.json"
    if beside.is_file():
        from library.models.folders import read_json

        config = read_json(beside)
        if config.get("_class_name") == "AutoencoderKL":
            return config
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    widths = []
    while (key := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in shapes:
        widths.append(shapes[key][0])
    layers = sum(f"encoder.down_blocks.0.resnets.{j}.conv1.weight" in shapes for j in range(8))
    latent_channels = shapes["post_quant_conv.weight"][0]
    return vae_config(VaeDimensions(tuple(widths), latent_channels, layers), scaling_factor)


@torch.no_grad()
def encode_images(
    vae: nn.Module, images: torch.Tensor, *, slice_size: int | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Pictures -> sampled latents, not yet multiplied by the family's latent scale.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        slice_size: pictures coded at once; None for all.
        generator: of the posterior's noise; None draws from torch's global one.

    Returns:
        (B, 4, H/8, W/8) in the VAE's dtype.
    """
    weight = next(vae.parameters())
    parts = [
        vae.encode(part.to(weight.device, weight.dtype)).latent_dist.sample(generator)
        for part in images.split(slice_size or len(images))
    ]
    return torch.cat(parts)


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: torch.Tensor, *, slice_size: int | None = None) -> torch.Tensor:
    """Latents already divided by the family's latent scale -> pictures (B, 3, H, W), about [-1, 1]."""
    weight = next(vae.parameters())
    parts = [
        vae.decode(part.to(weight.device, weight.dtype)).sample for part in latents.split(slice_size or len(latents))
    ]
    return torch.cat(parts)
