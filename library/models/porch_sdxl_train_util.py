"""The part of `library.sdxl_train_util` on models, tokenizers and sizes, under the old signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.messages import UserError
from library.models.layers import timestep_embedding as sinusoids
from library.models.porch_sdxl_model_util import Parts, open_parts
from library.models.sdxl import LATENT_SCALE, StableDiffusionXL
from library.models.text_encoders import pooled_rows
from library.models.tokenizers import CLIP_L, OPENCLIP_BIGG
from library.models.unet_sdxl import size_embeddings
from library.models.vae import load_vae
from library.replaceable import replacement

TOKENIZER1_PATH = CLIP_L.repository
TOKENIZER2_PATH = OPENCLIP_BIGG.repository


def load_tokenizers(args: Any) -> list[Any]:
    """The two tokenizers; the second pads with id 0."""
    return StableDiffusionXL().load_tokenizers(cache_dir=getattr(args, "tokenizer_cache_dir", None))


def match_mixed_precision(args: Any, weight_dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of U-Net and VAE: half precision with `--full_fp16` or `--full_bf16`, else None (float32).

    Raises:
        UserError: mixed precision of another format.
    """
    for flag, dtype, word in (("full_fp16", torch.float16, "fp16"), ("full_bf16", torch.bfloat16, "bf16")):
        if getattr(args, flag, False):
            if weight_dtype != dtype:
                raise UserError(f"--{flag} without --mixed_precision={word}", f"give --mixed_precision={word}")
            return weight_dtype
    return None


def load_target_model(
    args: Any, accelerator: Any, model_version: str, weight_dtype: torch.dtype
) -> tuple[bool, nn.Module, nn.Module, Any, nn.Module, Any, Any]:
    """(from a single file?, encoder 1, encoder 2, VAE, U-Net, logit scale, checkpoint info).

    One process of a machine after the other; with `--lowram` straight to the accelerator's device.
    """
    load = replacement("sdxl_train_util", "_load_target_model") or _load_target_model
    device = accelerator.device if getattr(args, "lowram", False) else "cpu"
    loaded: Any = None
    for index in range(accelerator.state.num_processes):
        if index == accelerator.state.local_process_index:
            loaded = load(
                args.pretrained_model_name_or_path,
                getattr(args, "vae", None),
                model_version,
                weight_dtype,
                device,
                match_mixed_precision(args, weight_dtype),
            )
        accelerator.wait_for_everyone()
    return loaded


def _load_target_model(
    name_or_path: str | Path,
    vae_path: str | Path | None,
    model_version: str | None,
    weight_dtype: torch.dtype,
    device: str | torch.device = "cpu",
    model_dtype: torch.dtype | None = None,
) -> tuple[bool, nn.Module, nn.Module, Any, nn.Module, Any, Any]:
    """The same; a given VAE has `weight_dtype`, U-Net and the model's own VAE `model_dtype` (None: float32)."""
    parts: Parts = open_parts(name_or_path, model_dtype, device, with_vae=vae_path is None)
    first, second, vae, unet, logit_scale, info = parts
    if vae_path is not None:
        vae = load_vae(vae_path, scaling_factor=LATENT_SCALE, dtype=weight_dtype, device=device)
    return Path(name_or_path).is_file(), first, second, vae, unet, logit_scale, info


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: int = 10000) -> torch.Tensor:
    """Numbers (n,) -> float32 (n, dim), cosines first."""
    return sinusoids(timesteps, dim, max_period=max_period)


def get_timestep_embedding(x: torch.Tensor, outdim: int) -> torch.Tensor:
    """Numbers (B, n) -> float32 (B, n * outdim), each embedded alone."""
    return sinusoids(x.reshape(-1), outdim).reshape(len(x), -1)


def get_size_embeddings(
    orig_size: torch.Tensor, crop_size: torch.Tensor, target_size: torch.Tensor, device: str | torch.device
) -> torch.Tensor:
    """Three pairs (B, 2) -> (B, 1536) on the device."""
    return size_embeddings(*(pair.to(device) for pair in (orig_size, crop_size, target_size)))


def get_hidden_states_sdxl(
    max_token_length: int | None,
    input_ids1: torch.Tensor,
    input_ids2: torch.Tensor,
    tokenizer1: Any,
    tokenizer2: Any,
    text_encoder1: nn.Module,
    text_encoder2: nn.Module,
    weight_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (B, n, 77) -> (hidden states 1, hidden states 2, pooled text); the dtype is that of the states."""
    texts = StableDiffusionXL().encode_text(
        [text_encoder1, text_encoder2],
        [input_ids1, input_ids2],
        tokenizers=[tokenizer1, tokenizer2],
        max_token_length=max_token_length,
        dtype=weight_dtype,
    )
    assert texts.pooled is not None
    return texts.hidden[0], texts.hidden[1], texts.pooled


def pool_workaround(
    text_encoder: nn.Module, last_hidden_state: torch.Tensor, input_ids: torch.Tensor, eos_token_id: int
) -> torch.Tensor:
    """The pooled text of rows (B, L), from the last hidden states (B, L, D)."""
    return pooled_rows(text_encoder, last_hidden_state, input_ids, eos_token_id)
