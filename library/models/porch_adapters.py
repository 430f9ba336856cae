"""Old functions around models and text that third parties call with a script's namespace (`library.train_util`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from library.models import modelspec
from library.models.modelspec import metadata_of_run
from library.models.sd import StableDiffusion
from library.models.text_encoders import encode_chunks
from library.models.tokenizers import CLIP_L, OPENCLIP_H, load_tokenizer
from library.options.declare import from_namespace
from library.options.metadata import MetadataConfig
from library.replaceable import replacement

TOKENIZER_PATH = CLIP_L.repository
V2_STABLE_DIFFUSION_PATH = OPENCLIP_H.repository


def load_tokenizer_of_args(args: Any) -> Any:
    """`load_tokenizer(args)`: the CLIP tokenizer of the family that `args.v2` says."""
    kind = OPENCLIP_H if getattr(args, "v2", False) else CLIP_L
    return load_tokenizer(kind, getattr(args, "tokenizer_cache_dir", None))


def load_target_model_on(
    args: Any,
    weight_dtype: torch.dtype,
    device: str | torch.device = "cpu",
    unet_use_linear_projection_in_v2: bool = False,
) -> tuple[nn.Module, Any, nn.Module, bool]:
    """`_load_target_model`: (text encoder, VAE, U-Net, came from a single file), float32, a given `--vae` as dtype."""
    family = StableDiffusion()
    model = family.load(args.pretrained_model_name_or_path, v2=getattr(args, "v2", False), device=device)
    if getattr(args, "vae", None):
        from library.models.vae import load_vae

        model.vae = load_vae(args.vae, scaling_factor=family.latent_scale, dtype=weight_dtype, device=device)
    return model.text_encoders[0], model.vae, model.unet, model.is_stability_layout


def load_target_model(
    args: Any, weight_dtype: torch.dtype, accelerator: Any, unet_use_linear_projection_in_v2: bool = False
) -> tuple[nn.Module, Any, nn.Module, bool]:
    """The same, one process of a machine after the other; with `--lowram` straight to the accelerator's device."""
    device = accelerator.device if getattr(args, "lowram", False) else "cpu"
    load = replacement("train_util", "_load_target_model") or load_target_model_on
    loaded: Any = None
    for index in range(accelerator.state.num_processes):
        if index == accelerator.state.local_process_index:
            loaded = load(args, weight_dtype, device, unet_use_linear_projection_in_v2)
        accelerator.wait_for_everyone()
    return loaded


def get_hidden_states(
    args: Any,
    input_ids: torch.Tensor,
    tokenizer: Any,
    text_encoder: nn.Module,
    weight_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Token ids (B, n, 77) -> context (B, L, D), with the namespace's clip skip and token length."""
    return encode_chunks(
        text_encoder,
        input_ids,
        clip_skip=getattr(args, "clip_skip", None),
        max_token_length=getattr(args, "max_token_length", None),
        dtype=weight_dtype,
    )


def load_metadata_from_safetensors(safetensors_file: str) -> dict[str, str]:
    """Header texts of a file whose name ends in `.safetensors`; else an empty dictionary."""
    return modelspec.load_metadata_from_safetensors(safetensors_file)


def get_sai_model_spec(
    state_dict: Any,
    args: Any,
    sdxl: bool,
    lora: bool,
    textual_inversion: bool,
    is_stable_diffusion_ckpt: bool | None = None,
) -> dict[str, str]:
    """The `modelspec.*` texts of what a run with this namespace writes now."""
    return metadata_of_run(
        from_namespace(MetadataConfig, args),
        kind="lora" if lora else "textual_inversion" if textual_inversion else "checkpoint",
        v2=getattr(args, "v2", False),
        v_parameterization=getattr(args, "v_parameterization", False),
        sdxl=sdxl,
        timestamp=time.time(),
        output_name=getattr(args, "output_name", None),
        resolution=getattr(args, "resolution", None),
        min_timestep=getattr(args, "min_timestep", None),
        max_timestep=getattr(args, "max_timestep", None),
        clip_skip=getattr(args, "clip_skip", None),
        is_stability_layout=is_stable_diffusion_ckpt,
    )


def transform_models_if_DDP(models: list[Any]) -> list[Any]:
    """The models without process wrappers; None is left out."""
    return [getattr(model, "module", model) for model in models if model is not None]


def transform_if_model_is_DDP(text_encoder: Any, unet: Any, network: Any = None) -> Iterator[Any]:
    """Text encoder, U-Net and, if given, network without process wrappers."""
    return iter(transform_models_if_DDP([text_encoder, unet, network]))
