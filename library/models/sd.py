"""The family SD 1.x and 2.x: one U-Net, one CLIP text encoder, one VAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.models.assembly import fill
from library.models.family import Family, LoadedModel, TextCondition
from library.models.folders import resolve_folder
from library.models.loading import compare_with_run, source_of, told_by_file, told_by_folder
from library.models.sd_loading import PARTS, file_parts, filled_folder_parts
from library.models.sd_saving import require_describable, save_folder, save_stability
from library.models.text_encoders import adopt, encode_chunks, restore_buffers, skipped_parameters
from library.models.tokenizers import CLIP_L, OPENCLIP_H, load_tokenizer
from library.models.vae import load_vae

if TYPE_CHECKING:
    from library.data.batch import Batch


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, epsilon and v-prediction."""

    name = "sd"
    latent_scale = 0.18215
    text_encoder_names = ("te",)
    default_size = 512
    size_multiple = 8
    repeated_block_classes = ("ResnetBlock2D", "Transformer2DModel")

    def version(self, v2: bool, v_parameterization: bool) -> str:
        return ("sd_v2" if v2 else "sd_v1") + ("_v" if v_parameterization else "")

    def load_tokenizers(
        self, v2: bool = False, cache_dir: str | None = None, max_token_length: int | None = None
    ) -> list[Any]:
        return [load_tokenizer(OPENCLIP_H if v2 else CLIP_L, cache_dir)]

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
            parts, checkpoint = file_parts(path, v2, weights, latent_scale=self.latent_scale, with_vae=vae is None)
            fill(checkpoint, list(parts.values()), device=device)
            told, extras = told_by_file(checkpoint), source_of(checkpoint, parts)
        else:
            path = resolve_folder(source, parts=(*PARTS, "scheduler", "tokenizer"), what="model")
            parts = filled_folder_parts(path, v2, weights, with_vae=vae is None, device=device)
            told, extras = told_by_folder(path), {"folder": str(path)}
        if v_parameterization is None:
            v_parameterization = told.prediction_type == "v_prediction"
        extras |= compare_with_run(
            source, told, v_parameterization=v_parameterization, zero_terminal_snr=zero_terminal_snr
        )
        text_encoder = parts["text_encoder"].module
        restore_buffers(text_encoder, device)
        return LoadedModel(
            text_encoders=[text_encoder],
            vae=load_vae(vae, scaling_factor=self.latent_scale, dtype=dtype, device=device)
            if vae is not None
            else parts["vae"].module,
            unet=parts["unet"].module,
            tokenizers=self.load_tokenizers(v2),
            source=str(path.resolve()) if Path(source).exists() else str(source),
            is_stability_layout=is_file,
            version=self.version(v2, v_parameterization),
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
            save_folder(model, target, safetensors=safetensors, dtype=dtype)

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
        hidden = encode_chunks(
            text_encoders[0], input_ids[0], clip_skip=clip_skip, max_token_length=max_token_length, dtype=dtype
        )
        return TextCondition([hidden])

    def idle_parameters(self, text_encoders: list[nn.Module], clip_skip: int | None = None) -> list[nn.Parameter]:
        """The layers that `clip_skip` leaves out."""
        return skipped_parameters(text_encoders[0], layers=(clip_skip or 1) - 1)

    def predict(
        self,
        unet: nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: TextCondition,
        batch: Batch,
        **residuals: Any,
    ) -> torch.Tensor:
        return unet(noisy_latents, timesteps, text.hidden[0], **residuals).sample
