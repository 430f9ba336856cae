"""`library.model_util` for third parties: SD 1.x and 2.x models under the old signatures.

Everything here is thin: the work is done by the family, the key maps and the writers of this room.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models import key_maps
from library.models.checkpoint import Checkpoint, PickleCheckpoint, is_safetensors_name, open_checkpoint
from library.models.dimensions import TextDimensions, VaeDimensions
from library.models.family import LoadedModel
from library.models.folders import read_json
from library.models.sd import StableDiffusion
from library.models.sd_saving import save_folder, save_stability, unused_v2_tensors
from library.models.text_encoders import empty_text_encoder, exchanged_key, text_config
from library.models.unet_config import UNetConfig
from library.models.vae import load_vae as open_vae
from library.models.vae import vae_config

VAE_PREFIX = key_maps.VAE_PREFIX
NUM_TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.0120
DIFFUSERS_REF_MODEL_ID_V1 = "runwayml/stable-diffusion-v1-5"
DIFFUSERS_REF_MODEL_ID_V2 = "stabilityai/stable-diffusion-2-1"
State = dict[str, torch.Tensor]


def is_safetensors(path: str | Path) -> bool:
    """Whether the name ends in `.safetensors`, in any case."""
    return is_safetensors_name(path)


def get_model_version_str_for_sd1_sd2(v2: bool, v_parameterization: bool) -> str:
    """`sd_v1`, `sd_v1_v`, `sd_v2`, `sd_v2_v`."""
    return StableDiffusion().version(v2, v_parameterization)


def load_models_from_stable_diffusion_checkpoint(
    v2: bool,
    ckpt_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    unet_use_linear_projection_in_v2: bool = True,
) -> tuple[nn.Module, Any, nn.Module]:
    """(text encoder, VAE, U-Net) of a Stability file, float32 unless `dtype` says otherwise.

    `unet_use_linear_projection_in_v2` is not read: projections of SD 2.x are always matrices here.
    """
    if not Path(ckpt_path).is_file():
        raise UserError(f"model file {ckpt_path} does not exist", "check the path")
    model = StableDiffusion().load(ckpt_path, v2=v2, dtype=dtype, device=device)
    return model.text_encoders[0], model.vae, model.unet


def load_vae(vae_id: str | Path, dtype: torch.dtype | None) -> Any:
    """A VAE from a file, a folder or a hub id."""
    return open_vae(vae_id, dtype=dtype)


def load_checkpoint_with_text_encoder_conversion(
    ckpt_path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, Any] | None, State]:
    """(the wrapper of a wrapped pickle, else None; state dict), old text-encoder names brought up to date."""
    checkpoint = open_checkpoint(ckpt_path)
    prefix = key_maps.CLIP_PREFIX
    state = {
        prefix + exchanged_key(key[len(prefix) :]) if key.startswith(prefix) else key: tensor
        for key, tensor in checkpoint.stream(device=device)
    }
    if not isinstance(checkpoint, PickleCheckpoint) or not checkpoint.is_wrapped:
        return None, state
    numbers = {"epoch": checkpoint.epoch, "global_step": checkpoint.global_step}
    return {"state_dict": state, **{k: v for k, v in numbers.items() if v is not None}}, state


def _as_model(v2: bool, text_encoder: nn.Module, unet: nn.Module, vae: Any, v_prediction: bool) -> LoadedModel:
    family = StableDiffusion()
    return LoadedModel(
        text_encoders=family.adopt([text_encoder]),
        vae=vae,
        unet=unet,
        version=family.version(v2, v_prediction),
        prediction_type="v_prediction" if v_prediction else "epsilon",
    )


def save_stable_diffusion_checkpoint(
    v2: bool,
    output_file: str | Path,
    text_encoder: nn.Module,
    unet: nn.Module,
    ckpt_path: str | Path | None,
    epochs: int,
    steps: int,
    metadata: Mapping[str, str] | None,
    save_dtype: torch.dtype | None = None,
    vae: Any = None,
) -> int:
    """Write a Stability file; returns the number of tensors.

    Args:
        ckpt_path: source whose other tensors (and VAE, if `vae` is None) are carried over, or None.
    """
    model = _as_model(v2, text_encoder, unet, vae, v_prediction=False)
    if ckpt_path is not None and Path(ckpt_path).is_file():
        _carry_from(model, open_checkpoint(Path(ckpt_path).resolve()))
    elif vae is None:
        raise UserError("the VAE is missing and there is no source file to take it from", "give the VAE")
    return save_stability(
        model,
        output_file,
        safetensors=is_safetensors(output_file),
        dtype=save_dtype,
        metadata=metadata,
        epoch=epochs,
        step=steps,
    )


def _carry_from(model: LoadedModel, source: Checkpoint) -> None:
    stat = source.path.stat()
    model.source = str(source.path)
    model.prediction_type = "v_prediction" if "v_pred" in source.tensors else "epsilon"
    model.extras = {
        "other_tensors": list(source.tensors),
        "source_stamp": (stat.st_size, stat.st_mtime_ns),
        "source_epoch": source.epoch,
        "source_step": source.global_step,
        "zero_terminal_snr": "ztsnr" in source.tensors,
    }


def save_diffusers_checkpoint(
    v2: bool,
    output_dir: str | Path,
    text_encoder: nn.Module,
    unet: nn.Module,
    pretrained_model_name_or_path: str | Path | None,
    vae: Any = None,
    use_safetensors: bool = False,
) -> None:
    """Write a diffusers folder; tokenizer and prediction type come from the source folder if there is one."""
    source = Path(pretrained_model_name_or_path) if pretrained_model_name_or_path is not None else None
    scheduler = source / "scheduler" / "scheduler_config.json" if source is not None else None
    told = read_json(scheduler).get("prediction_type") if scheduler is not None and scheduler.is_file() else None
    if vae is None:
        if source is None:
            raise UserError("the VAE is missing and there is no source to take it from", "give the VAE")
        vae = open_vae(source)
    model = _as_model(v2, text_encoder, unet, vae, v_prediction=told == "v_prediction")
    if source is not None and source.is_dir():
        model.extras["folder"] = str(source)
    save_folder(model, output_dir, safetensors=use_safetensors)


def create_unet_diffusers_config(v2: bool, use_linear_projection_in_v2: bool = False) -> dict[str, Any]:
    """diffusers config of a full-size U-Net."""
    heads = (5, 10, 20, 20) if v2 else 8
    config = UNetConfig(
        attention_head_dim=heads,
        cross_attention_dim=1024 if v2 else 768,
        use_linear_projection=v2 and use_linear_projection_in_v2,
    )
    return config.to_diffusers()


def create_vae_diffusers_config() -> dict[str, Any]:
    """diffusers config of the full-size VAE."""
    return vae_config(VaeDimensions((128, 256, 512, 512)), StableDiffusion.latent_scale)


def convert_ldm_unet_checkpoint(v2: bool, checkpoint: State, config: Mapping[str, Any]) -> State:
    """U-Net of a Stability state dict in our names; its keys leave `checkpoint`.

    SD 2.x projections become 1x1 convolutions unless the config has `use_linear_projection`.
    """
    prefix = key_maps.UNET_PREFIX
    table = key_maps.sd_unet_map(len(config["block_out_channels"]))
    keys = [key for key in checkpoint if key.startswith(prefix)]
    renamed = {table.to_diffusers(key[len(prefix) :]): checkpoint.pop(key) for key in keys}
    state = {key: tensor for key, tensor in renamed.items() if key is not None}
    if v2 and not config.get("use_linear_projection", False):
        linear_transformer_to_conv(state)
    return state


def convert_unet_state_dict_to_sd(v2: bool, unet_state_dict: State) -> State:
    """Our U-Net state dict in Stability names, without prefix."""
    levels = len({key.split(".")[1] for key in unet_state_dict if key.startswith("down_blocks.")})
    shapes = {key: tuple(tensor.shape) for key, tensor in unet_state_dict.items()}
    entries = key_maps.unet_entries(shapes, key_maps.sd_unet_map(levels), linear_projections=v2, prefix="")
    return _to_file(entries, unet_state_dict)


def convert_ldm_vae_checkpoint(checkpoint: State, config: Mapping[str, Any]) -> State:
    """VAE of a Stability state dict in diffusers' names."""
    prefix = key_maps.VAE_PREFIX
    table = key_maps.vae_map(len(config["block_out_channels"]), config["layers_per_block"])
    state: State = {}
    for key, tensor in checkpoint.items():
        ours = table.to_diffusers(key[len(prefix) :]) if key.startswith(prefix) else None
        if ours is not None:
            is_attention = ".attentions.0." in ours and tensor.ndim == 4
            state[ours] = tensor[:, :, 0, 0] if is_attention else tensor
    return state


def convert_vae_state_dict(vae_state_dict: State) -> State:
    """diffusers' VAE state dict in Stability names, without prefix."""
    shapes = {key: tuple(tensor.shape) for key, tensor in vae_state_dict.items()}
    levels = len({key.split(".")[2] for key in shapes if key.startswith("encoder.down_blocks.")})
    layers = len({key.split(".")[4] for key in shapes if key.startswith("encoder.down_blocks.0.resnets.")})
    return _to_file(key_maps.vae_entries(shapes, levels=levels, layers=layers, prefix=""), vae_state_dict)


def convert_ldm_clip_checkpoint_v1(checkpoint: State) -> State:
    """Text encoder of an SD 1.x state dict in transformers' names."""
    prefix = key_maps.CLIP_PREFIX
    renamed = {exchanged_key(k[len(prefix) :]): v for k, v in checkpoint.items() if k.startswith(prefix)}
    return {key: tensor for key, tensor in renamed.items() if not key.endswith("position_ids")}


def convert_ldm_clip_checkpoint_v2(checkpoint: State, max_length: int) -> State:
    """Text encoder of an SD 2.x state dict in transformers' names; the unused last block is left out."""
    prefix = key_maps.OPENCLIP_PREFIX
    last = max(int(m.group(1)) for m in (re.search(r"\.resblocks\.(\d+)\.", key) for key in checkpoint) if m)
    width = checkpoint[prefix + "ln_final.weight"].shape[0]
    fc1 = checkpoint[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    vocabulary = checkpoint[prefix + "token_embedding.weight"].shape[0]
    dimensions = TextDimensions(width, last, fc1, vocabulary, max_length, "gelu")
    module = empty_text_encoder(text_config(dimensions))
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    state: State = {}
    for entry in key_maps.openclip_entries(shapes, layers=last):
        state.update(entry.to_module(checkpoint[entry.file_key]))
    return state


def convert_text_encoder_state_dict_to_sd_v2(checkpoint: State, make_dummy_weights: bool = False) -> State:
    """SD 2.x text encoder state dict in OpenCLIP names, without prefix.

    Args:
        make_dummy_weights: add the unused last block, projection and scale.
    """
    state = {exchanged_key(k): v for k, v in checkpoint.items() if not k.endswith("position_ids")}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    layers = len({key.split(".")[3] for key in shapes if key.startswith("text_model.encoder.layers.")})
    result = _to_file(key_maps.openclip_entries(shapes, layers=layers, prefix=""), state)
    if make_dummy_weights:
        cut = len(key_maps.OPENCLIP_PREFIX)
        result |= {item.name[cut:]: item.make().to(item.dtype) for item in unused_v2_tensors(state, None)}
    return result


def _to_file(entries: Iterable[key_maps.Entry], state: Mapping[str, torch.Tensor]) -> State:
    return {entry.file_key: entry.to_file([state[key] for key in entry.module_keys]) for entry in entries}


def conv_transformer_to_linear(checkpoint: State) -> None:
    """Projections of the attentions from 1x1 convolutions to matrices, in place."""
    for key, tensor in checkpoint.items():
        if key.endswith(("proj_in.weight", "proj_out.weight")) and tensor.ndim > 2:
            checkpoint[key] = tensor[:, :, 0, 0]


def linear_transformer_to_conv(checkpoint: State) -> None:
    """Projections of the attentions from matrices to 1x1 convolutions, in place."""
    for key, tensor in checkpoint.items():
        if key.endswith(("proj_in.weight", "proj_out.weight")) and tensor.ndim == 2:
            checkpoint[key] = tensor[:, :, None, None]


def load_file(filename: str | Path, device: str | torch.device = "cpu") -> State:
    """The tensors of a model file."""
    return open_checkpoint(filename).read(device=device)
