"""`library.sdxl_model_util` for third parties: SDXL models under the old signatures.

Everything here is thin: the work is done by the family, the key maps and the writers of this room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models import key_maps
from library.models.assembly import fill, shapes_of
from library.models.dimensions import openclip_dimensions
from library.models.family import LoadedModel
from library.models.folders import resolve_folder
from library.models.sdxl import LATENT_SCALE, VERSION, StableDiffusionXL
from library.models.sdxl_loading import (
    LOGIT_SCALE,
    PARTS,
    checkpoint_info,
    file_parts,
    filled_folder_parts,
    logit_scale_of,
)
from library.models.sdxl_saving import save_folder, save_stability
from library.models.text_encoders import PROJECTING, empty_text_encoder, exchanged_key, restore_buffers, text_config
from library.models.unet_config import SdxlUNetConfig
from library.models.vae import load_vae

VAE_SCALE_FACTOR = LATENT_SCALE
MODEL_VERSION_SDXL_BASE_V1_0 = VERSION
DIFFUSERS_REF_MODEL_ID_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
DIFFUSERS_SDXL_UNET_CONFIG = SdxlUNetConfig().to_diffusers()
State = dict[str, torch.Tensor]
Parts = tuple[nn.Module, nn.Module, Any, nn.Module, Any, Any]


def load_models_from_sdxl_checkpoint(
    model_version: str | None,
    ckpt_path: str | Path,
    map_location: str | torch.device,
    dtype: torch.dtype | None = None,
    disable_mmap: bool = False,
) -> Parts:
    """(text encoder 1, text encoder 2, VAE, U-Net, logit scale, (epoch, step) of a pickle) of a Stability file.

    Args:
        model_version, disable_mmap: not read; files are never mapped here.
        map_location: where the weights go.
        dtype: of U-Net and VAE; the text encoders are float32.
    """
    if not Path(ckpt_path).is_file():
        raise UserError(f"model file {ckpt_path} does not exist", "check the path")
    return open_parts(ckpt_path, dtype, map_location)


def open_parts(
    source: str | Path, dtype: torch.dtype | None, device: str | torch.device, *, with_vae: bool = True
) -> Parts:
    """The same of a file, folder or hub id; without `with_vae` the VAE is None."""
    options: dict[str, Any] = {"with_vae": with_vae, "text_dtype": torch.float32}
    dtype = dtype or torch.float32
    logit_scale, info = None, None
    if Path(source).is_file():
        parts, checkpoint = file_parts(Path(source).resolve(), dtype, latent_scale=LATENT_SCALE, **options)
        fill(checkpoint, list(parts.values()), device=device)
        logit_scale, info = logit_scale_of(checkpoint), checkpoint_info(checkpoint)
    else:
        folder = resolve_folder(source, parts=PARTS, what="model")
        parts = filled_folder_parts(folder, dtype, device=device, **options)
    first, second = parts["text_encoder"].module, parts["text_encoder_2"].module
    for encoder in (first, second):
        restore_buffers(encoder, device)
    return first, second, parts["vae"].module if with_vae else None, parts["unet"].module, logit_scale, info


def _as_model(first: nn.Module, second: nn.Module, unet: nn.Module, vae: Any, v_prediction: bool) -> LoadedModel:
    return LoadedModel(
        text_encoders=StableDiffusionXL().adopt([first, second]),
        vae=vae,
        unet=unet,
        version=VERSION,
        prediction_type="v_prediction" if v_prediction else "epsilon",
    )


def save_stable_diffusion_checkpoint(
    output_file: str | Path,
    text_encoder1: nn.Module,
    text_encoder2: nn.Module,
    unet: nn.Module,
    epochs: int,
    steps: int,
    ckpt_info: tuple[Any, Any] | None,
    vae: Any,
    logit_scale: Any,
    metadata: Mapping[str, str] | None,
    save_dtype: torch.dtype | None = None,
) -> int:
    """Write a Stability file; returns the number of tensors.

    Args:
        ckpt_info: epoch and step of the source, which `epochs` and `steps` are added to (pickles only).
        logit_scale: written back beside the second text encoder; None writes what SDXL was published with.
        metadata: with ModelSpec's prediction type `v` the file is marked for v-prediction.
    """
    v_prediction = (metadata or {}).get("modelspec.prediction_type") == "v"
    model = _as_model(text_encoder1, text_encoder2, unet, vae, v_prediction)
    model.extras["logit_scale"] = logit_scale
    if ckpt_info is not None:
        model.extras["source_epoch"], model.extras["source_step"] = ckpt_info
    return save_stability(
        model,
        output_file,
        safetensors=Path(output_file).suffix.lower() == ".safetensors",
        dtype=save_dtype,
        metadata=metadata,
        epoch=epochs,
        step=steps,
    )


def save_diffusers_checkpoint(
    output_dir: str | Path,
    text_encoder1: nn.Module,
    text_encoder2: nn.Module,
    unet: nn.Module,
    pretrained_model_name_or_path: str | Path | None,
    vae: Any = None,
    use_safetensors: bool = False,
    save_dtype: torch.dtype | None = None,
) -> None:
    """Write a diffusers folder; tokenizers and a missing VAE come from the source."""
    source = pretrained_model_name_or_path
    if vae is None:
        if source is None:
            raise UserError("the VAE is missing and there is no source to take it from", "give the VAE")
        vae = load_vae(source, scaling_factor=LATENT_SCALE)
    model = _as_model(text_encoder1, text_encoder2, unet, vae, v_prediction=False)
    if source is not None and Path(source).is_dir():
        model.extras["folder"] = str(source)
    save_folder(model, output_dir, latent_scale=LATENT_SCALE, safetensors=use_safetensors, dtype=save_dtype)


# State dicts


def make_unet_conversion_map() -> list[tuple[str, str]]:
    """(Stability prefix, diffusers prefix) of the U-Net's parts, each with its final dot."""
    return [(f"{theirs}.", f"{ours}.") for theirs, ours in key_maps.sdxl_unet_map().rules]


def convert_unet_state_dict(src_sd: Mapping[str, torch.Tensor], conversion_map: Mapping[str, str]) -> State:
    """Keys rewritten by the longest prefix that the map has.

    Raises:
        AssertionError: a key without a rule.
    """
    table = key_maps.PrefixMap([(a.rstrip("."), b.rstrip(".")) for a, b in conversion_map.items()])
    converted = {key: table.to_diffusers(key) for key in src_sd}
    strangers = [key for key, name in converted.items() if name is None]
    assert not strangers, f"keys not found in the conversion map: {', '.join(strangers[:10])}"
    return {str(converted[key]): tensor for key, tensor in src_sd.items()}


def convert_diffusers_unet_state_dict_to_sdxl(du_sd: Mapping[str, torch.Tensor]) -> State:
    """A U-Net state dict of a diffusers folder in the names of our U-Net."""
    return convert_unet_state_dict(du_sd, {ours: theirs for theirs, ours in make_unet_conversion_map()})


def convert_sdxl_unet_state_dict_to_diffusers(sd: Mapping[str, torch.Tensor]) -> State:
    """A state dict of our U-Net in the names of a diffusers folder."""
    return convert_unet_state_dict(sd, dict(make_unet_conversion_map()))


def convert_sdxl_text_encoder_2_checkpoint(
    checkpoint: Mapping[str, torch.Tensor], max_length: int
) -> tuple[State, torch.Tensor | None]:
    """(state dict of the second text encoder in transformers' names, logit scale) from a Stability state dict.

    Args:
        checkpoint: keys below `conditioner.embedders.1.model.`; others are left alone.
        max_length: positions; not read, the file has them.
    """
    prefix = key_maps.SDXL_OPENCLIP_PREFIX
    dimensions = openclip_dimensions({k: tuple(v.shape) for k, v in checkpoint.items()}, prefix, unused_layers=0)
    names = empty_text_encoder(text_config(dimensions, PROJECTING)).state_dict()
    state: State = {}
    for entry in key_maps.openclip_entries(dict.fromkeys(names, ()), layers=dimensions.layers, prefix=prefix):
        state.update(entry.to_module(checkpoint[entry.file_key]))
    return state, checkpoint.get(LOGIT_SCALE)


def convert_text_encoder_2_state_dict_to_sdxl(checkpoint: Mapping[str, torch.Tensor], logit_scale: Any) -> State:
    """State dict of the second text encoder in OpenCLIP's names, without prefix; `logit_scale` added unless None."""
    state = {exchanged_key(k): v for k, v in checkpoint.items() if not k.endswith("position_ids")}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    layers = len({key.split(".")[3] for key in shapes if key.startswith("text_model.encoder.layers.")})
    entries = key_maps.openclip_entries(shapes, layers=layers, prefix="")
    result = {entry.file_key: entry.to_file([state[key] for key in entry.module_keys]) for entry in entries}
    return result if logit_scale is None else result | {"logit_scale": logit_scale}


def _load_state_dict_on_device(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    device: str | torch.device,
    dtype: torch.dtype | None = None,
) -> Any:
    """Give a module without memory its tensors.

    Raises:
        RuntimeError: keys are missing or unexpected; lists them.
    """
    wanted = shapes_of(model)
    missing, unexpected = _without(wanted, state_dict), _without(state_dict, wanted)
    if missing or unexpected:
        lists = f"missing: {', '.join(missing)}; unexpected: {', '.join(unexpected)}"
        raise RuntimeError(f"keys do not fit {type(model).__name__}: {lists}")
    moved = {key: tensor.to(device=device, dtype=dtype or tensor.dtype) for key, tensor in state_dict.items()}
    return model.load_state_dict(moved, strict=True, assign=True)


def _without(keys: Iterable[str], others: Iterable[str]) -> list[str]:
    others = set(others)
    return [key for key in keys if key not in others]
