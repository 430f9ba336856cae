"""The family SDXL: a U-Net that also knows sizes, two CLIP text encoders, one VAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.models.assembly import fill
from library.models.family import Family, LoadedModel, TextCondition
from library.models.folders import resolve_folder
from library.models.loading import compare_with_run, source_of, told_by_file, told_by_folder
from library.models.sdxl_loading import PARTS, checkpoint_info, file_parts, filled_folder_parts, logit_scale_of
from library.models.sdxl_saving import require_describable, save_folder, save_stability
from library.models.text_encoders import adopt, encode_with_pooled, restore_buffers, skipped_parameters
from library.models.tokenizers import CLIP_L, OPENCLIP_BIGG, load_tokenizer
from library.models.unet_sdxl import size_embeddings
from library.models.vae import load_vae

if TYPE_CHECKING:
    from library.data.batch import Batch

VERSION = "sdxl_base_v1-0"
LATENT_SCALE = 0.13025


class StableDiffusionXL(Family):
    """Stable Diffusion XL base, epsilon and v-prediction."""

    name = "sdxl"
    latent_scale = LATENT_SCALE
    text_encoder_names = ("te1", "te2")
    default_size = 1024
    size_multiple = 32
    repeated_block_classes = ("ResnetBlock2D", "BasicTransformerBlock")

    def version(self, v2: bool = False, v_parameterization: bool = False) -> str:
        return VERSION

    def load_tokenizers(
        self, v2: bool = False, cache_dir: str | None = None, max_token_length: int | None = None
    ) -> list[Any]:
        return [load_tokenizer(kind, cache_dir) for kind in (CLIP_L, OPENCLIP_BIGG)]

    def load(
        self,
        source: str | Path,
        *,
        v2: bool = False,
        v_parameterization: bool | None = False,
        zero_terminal_snr: bool | None = None,
        vae: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> LoadedModel:
        vae = vae or None  # front ends write an empty text
        path, is_file = Path(source), Path(source).is_file()
        weights = dtype or torch.float32
        if is_file:
            path = path.resolve()
            parts, checkpoint = file_parts(path, weights, latent_scale=self.latent_scale, with_vae=vae is None)
            fill(checkpoint, list(parts.values()), device=device)
            told, extras = told_by_file(checkpoint), source_of(checkpoint, parts)
            extras |= {"logit_scale": logit_scale_of(checkpoint), "ckpt_info": checkpoint_info(checkpoint)}
        else:
            path = resolve_folder(source, parts=(*PARTS, "scheduler", "tokenizer", "tokenizer_2"), what="model")
            parts = filled_folder_parts(path, weights, with_vae=vae is None, device=device)
            told, extras = told_by_folder(path), {"folder": str(path), "logit_scale": None, "ckpt_info": None}
        if v_parameterization is None:
            v_parameterization = told.prediction_type == "v_prediction"
        extras |= compare_with_run(
            source, told, v_parameterization=v_parameterization, zero_terminal_snr=zero_terminal_snr
        )
        text_encoders = [parts[name].module for name in ("text_encoder", "text_encoder_2")]
        for text_encoder in text_encoders:
            restore_buffers(text_encoder, device)
        return LoadedModel(
            text_encoders=text_encoders,
            vae=load_vae(vae, scaling_factor=self.latent_scale, dtype=dtype, device=device)
            if vae is not None
            else parts["vae"].module,
            unet=parts["unet"].module,
            tokenizers=self.load_tokenizers(),
            source=str(path.resolve()) if Path(source).exists() else str(source),
            is_stability_layout=is_file,
            version=self.version(),
            prediction_type="v_prediction" if v_parameterization else "epsilon",
            extras=extras,
        )

    def adopt(self, text_encoders: list[nn.Module]) -> list[nn.Module]:
        """Text encoders that foreign code opened, with the module names that this family uses."""
        return [adopt(encoder) for encoder in text_encoders]

    def save(
        self,
        model: LoadedModel,
        target: str | Path,
        *,
        stability_layout: bool,
        safetensors: bool = True,
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
        epoch: int = 0,
        step: int = 0,
    ) -> None:
        if stability_layout:
            save_stability(
                model, target, safetensors=safetensors, dtype=dtype, metadata=metadata, epoch=epoch, step=step
            )
        else:
            save_folder(model, target, latent_scale=self.latent_scale, safetensors=safetensors, dtype=dtype)

    def require_single_file(self, model: LoadedModel) -> None:
        require_describable(model)

    def encode_text(
        self,
        text_encoders: list[nn.Module],
        input_ids: list[torch.Tensor],
        *,
        tokenizers: list[Any],
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> TextCondition:
        """Token ids (B, n, 77) per encoder -> their penultimate states, and the pooled text of the second.

        `clip_skip` has no effect: SDXL always takes the penultimate layer. `dtype` is that of the hidden states;
        the pooled text keeps the encoder's.
        """
        hidden, pooled = [], None
        for encoder, ids, tokenizer in zip(text_encoders, input_ids, tokenizers, strict=True):
            states, pooled = encode_with_pooled(
                encoder, ids, eos_id=tokenizer.eos_token_id, max_token_length=max_token_length, dtype=dtype
            )
            hidden.append(states)
        return TextCondition(hidden, pooled)

    def idle_parameters(self, text_encoders: list[nn.Module], clip_skip: int | None = None) -> list[nn.Parameter]:
        """The first encoder's last layer and final norm; the second's make the pooled text."""
        return skipped_parameters(text_encoders[0], layers=1, final_norm=True)

    def predict(
        self,
        unet: nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: TextCondition,
        batch: Batch,
        **residuals: Any,
    ) -> torch.Tensor:
        # One format for all: the latents' (callers give it), as a text cache may hold another.
        like = noisy_latents
        context = torch.cat([states.to(like) for states in text.hidden], dim=-1)
        sizes = size_vector(batch, like.device)
        vector = torch.cat([text.pooled.to(like), sizes.to(like.dtype)], dim=-1)
        return unet(noisy_latents, timesteps, context, vector, **residuals)


def size_vector(batch: Batch, device: torch.device) -> torch.Tensor:
    """The six embedded sizes (B, 1536) of a batch, float32: original size, crop, target size."""
    names = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
    return size_embeddings(*(batch[name].to(device, non_blocking=True) for name in names))
