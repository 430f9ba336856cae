"""What a model family (SD 1.x/2.x, SDXL, ...) can do. The loop and the engine know this and nothing more.

A new family is a file with a subclass and an entry in `FAMILIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from library.data.batch import Batch


@dataclass
class LoadedModel:
    """The parts of an opened model, and what is needed to write it back in its own layout.

    Attributes:
        text_encoders: one per tokenizer, in the family's order.
        vae: diffusers' AutoencoderKL.
        unet: this project's U-Net of the family.
        tokenizers: one per text encoder.
        source: the path or name it came from (symlinks resolved).
        is_stability_layout: it came from one file in Stability layout (else a diffusers folder).
        version: `sd_v1`, `sd_v1_v`, `sd_v2`, `sd_v2_v`, `sdxl_base_v1-0`.
        prediction_type: `epsilon` or `v_prediction`, as the caller stated or the file says.
        extras: what else a writer of the same family wants back (SDXL: `logit_scale`, `ckpt_info`), and what the
            source says of itself: `told_prediction_type` (or None), `zero_terminal_snr`.
    """

    text_encoders: list[nn.Module]
    vae: Any
    unet: nn.Module
    tokenizers: list[Any] = field(default_factory=list)
    source: str = ""
    is_stability_layout: bool = True
    version: str = ""
    prediction_type: str = "epsilon"
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass
class TextCondition:
    """Encoded text as the U-Net takes it.

    Attributes:
        hidden: one (B, L, D_i) tensor per text encoder, not yet joined.
        pooled: (B, P), or None for families without pooled text.
    """

    hidden: list[torch.Tensor]
    pooled: torch.Tensor | None = None


class Family(ABC):
    """One family of models. Stateless: every method takes what it works on.

    Attributes:
        name: `sd` or `sdxl`.
        latent_scale: factor between VAE latents and U-Net latents.
        text_encoder_names: prefixes in network files and logs, e.g. (`te`,) or (`te1`, `te2`).
        default_size: side of a picture when the user gives none.
        size_multiple: picture sides must be multiples of this.
        repeated_block_classes: class names of the blocks to checkpoint and compile one by one.
    """

    name: str
    latent_scale: float
    text_encoder_names: tuple[str, ...]
    default_size: int
    size_multiple: int
    repeated_block_classes: tuple[str, ...]

    @abstractmethod
    def version(self, v2: bool, v_parameterization: bool) -> str:
        """`ss_base_model_version` of a model of this family."""

    @abstractmethod
    def load_tokenizers(self, v2: bool, cache_dir: str | None, max_token_length: int | None) -> list[Any]:
        """The family's tokenizers (transformers CLIPTokenizer); shipped vocabulary unless `cache_dir` has one."""

    @abstractmethod
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
        """Open a Stability file, a diffusers folder or a hub id.

        Args:
            source: path or hub id.
            v_parameterization, zero_terminal_snr: how the caller uses the model; a source that says otherwise of
                itself is named in a warning. None: as the source says.
            vae: a file, folder or hub id that replaces the model's VAE.
            dtype: of the loaded weights; None = float32 for SD, as the specification says for the others.
            device: where the weights go, tensor by tensor.

        Raises:
            UserError: not there, truncated, not a model, or of another family (named from its tensors).
        """

    @abstractmethod
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
        """Write one file in Stability layout or a diffusers folder, atomically, disk room checked first."""

    @abstractmethod
    def require_single_file(self, model: LoadedModel) -> None:
        """Refuse a model that one file in Stability layout cannot describe; `save` would, after the training."""

    @abstractmethod
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
        """Token ids (B, n, 77) per encoder -> hidden states joined over chunks as training.md 5 says."""

    def idle_parameters(self, text_encoders: list[nn.Module], clip_skip: int | None = None) -> list[nn.Parameter]:
        """Parameters of the text encoders on which nothing depends that `encode_text` gives."""
        return []

    @abstractmethod
    def predict(
        self,
        unet: nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: TextCondition,
        batch: Batch,
        **residuals: Any,
    ) -> torch.Tensor:
        """One U-Net call: noisy latents (B, 4, h, w), timesteps (B,) -> prediction of the latents' shape.

        `batch` gives size conditioning where the family has it; `residuals` are passed on (ControlNet).
        """


def family(name: str) -> Family:
    """The family called `sd` or `sdxl`."""
    import importlib

    module, attribute = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), attribute)()


FAMILIES = {"sd": "library.models.sd:StableDiffusion", "sdxl": "library.models.sdxl:StableDiffusionXL"}
