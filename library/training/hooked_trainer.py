"""What the trainer objects have in common: the hooks that open tokenizers and model, and that call the U-Net.

Third parties override these methods; names, argument order and results are those of sd-scripts 0.7.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from library.models.family import Family, LoadedModel, TextCondition, family
from library.replaceable import replacement

if TYPE_CHECKING:
    from library.training.draws import Place
    from library.training.run import Run


class HookedTrainer:
    """Opens an SD 1.x/2.x model for a trainer object and calls its U-Net.

    Attributes:
        vae_scale_factor: latents are multiplied by it at every step.
        is_sdxl: read when a file is saved, for its ModelSpec.
        load_stable_diffusion_format, logit_scale, ckpt_info: of the loaded model, for who writes it back.
        run: the run in progress (None before the first step); place: where its micro-step stands.
        script: whose options the namespace has; family_name: of the models.
    """

    script: str
    family_name = "sd"

    def __init__(self) -> None:
        self.vae_scale_factor = 0.18215
        self.is_sdxl = False
        self.load_stable_diffusion_format: bool | None = None
        self.logit_scale: Any = None
        self.ckpt_info: Any = None
        self.run: Run | None = None
        self.place: Place | None = None
        self.model: LoadedModel | None = None

    @property
    def family(self) -> Family:
        return family(self.family_name)

    def load_tokenizer(self, args: Any) -> Any:
        """One tokenizer, or a list for families with several."""
        foreign = replacement("train_util", "load_tokenizer")
        if foreign is not None:
            return foreign(args)
        tokenizers = self.family.load_tokenizers(args.v2, args.tokenizer_cache_dir, args.max_token_length)
        return tokenizers if len(tokenizers) > 1 else tokenizers[0]

    def load_target_model(self, args: Any, weight_dtype: torch.dtype, accelerator: Any) -> tuple[str, Any, Any, Any]:
        """Open the model.

        Returns:
            (model version, text encoder or list of them, VAE, U-Net).
        """
        device = accelerator.device if args.lowram else "cpu"
        foreign = replacement("train_util", "_load_target_model")
        if foreign is not None:
            encoder, vae, unet, self.load_stable_diffusion_format = foreign(args, weight_dtype, device)
            return self.family.version(args.v2, args.v_parameterization), encoder, vae, unet
        self.model = self.family.load(
            args.pretrained_model_name_or_path,
            v2=args.v2,
            v_parameterization=args.v_parameterization,
            zero_terminal_snr=args.zero_terminal_snr,
            vae=args.vae,
            device=device,
        )
        encoders = self.model.text_encoders
        return self.model.version, encoders if len(encoders) > 1 else encoders[0], self.model.vae, self.model.unet

    def call_unet(
        self,
        args: Any,
        accelerator: Any,
        unet: Any,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text_conds: Any,
        batch: Any,
        weight_dtype: torch.dtype,
        **kwargs: Any,
    ) -> torch.Tensor:
        """U-Net output for noisy latents (B, 4, h, w)."""
        return self.family.predict(unet, noisy_latents, timesteps, as_condition(text_conds), batch)


class HookedSdxlTrainer(HookedTrainer):
    """The same for SDXL; goes in front of a trainer in the list of base classes."""

    family_name = "sdxl"

    def __init__(self) -> None:
        super().__init__()
        self.vae_scale_factor = 0.13025
        self.is_sdxl = True

    def load_tokenizer(self, args: Any) -> Any:
        """Both tokenizers."""
        foreign = replacement("sdxl_train_util", "load_tokenizers")
        return super().load_tokenizer(args) if foreign is None else foreign(args)

    def load_target_model(self, args: Any, weight_dtype: torch.dtype, accelerator: Any) -> tuple[str, Any, Any, Any]:
        """Open the model; one that says of itself that it predicts otherwise than the options ask is named."""
        foreign = self._foreign_model(args, weight_dtype, accelerator)
        if foreign is not None:
            self.load_stable_diffusion_format, first, second, vae, unet, self.logit_scale, self.ckpt_info = foreign
            return self.family.version(False, args.v_parameterization), [first, second], vae, unet
        version, encoders, vae, unet = super().load_target_model(args, weight_dtype, accelerator)
        if self.model is not None:
            self.load_stable_diffusion_format = self.model.is_stability_layout
            self.logit_scale = self.model.extras.get("logit_scale")
            self.ckpt_info = self.model.extras.get("ckpt_info")
        return version, encoders, vae, unet

    def _foreign_model(self, args: Any, weight_dtype: torch.dtype, accelerator: Any) -> Any:
        """What a function that others put in place of the old loading functions gives, or None without one."""
        version = self.family.version(False, args.v_parameterization)
        whole = replacement("sdxl_train_util", "load_target_model")
        if whole is not None:
            return whole(args, accelerator, version, weight_dtype)
        inner = replacement("sdxl_train_util", "_load_target_model")
        if inner is None:
            return None
        device = accelerator.device if args.lowram else "cpu"
        return inner(args.pretrained_model_name_or_path, args.vae, version, weight_dtype, device)

    def call_unet(
        self,
        args: Any,
        accelerator: Any,
        unet: Any,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text_conds: Any,
        batch: Any,
        weight_dtype: torch.dtype,
        **kwargs: Any,
    ) -> torch.Tensor:
        """U-Net output for noisy latents (B, 4, h, w); all that goes in has the weight dtype."""
        latents = noisy_latents.to(weight_dtype)
        return super().call_unet(args, accelerator, unet, latents, timesteps, text_conds, batch, weight_dtype, **kwargs)


def as_condition(value: Any) -> TextCondition:
    """What `get_text_cond` gave, in any release's form, as a `TextCondition`."""
    if torch.is_tensor(value):
        return TextCondition([value])
    if len(value) == 1:
        return TextCondition([value[0]])
    return TextCondition(list(value[:-1]), value[-1])
