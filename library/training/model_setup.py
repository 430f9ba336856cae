"""Opens the model through a trainer's hook and puts its parts where the steps need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from library.models.family import LoadedModel
from library.runtime.wrap import WrapPolicy, wrap_model
from library.training.latents import encode, move_vae

if TYPE_CHECKING:
    from library.models.family import Family
    from library.options.parser import Resolved
    from library.training.draws import Draws
    from library.training.recipes.recipe import Setup


def open_through(
    trainer: Any, args: Any, weight_dtype: torch.dtype, accelerator: Any, tokenizers: list[Any]
) -> LoadedModel:
    """The model that `load_target_model` gave; modules that an override opened itself are adopted."""
    trainer.model = None
    version, encoders, vae, unet = trainer.load_target_model(args, weight_dtype, accelerator)
    encoders = list(encoders) if isinstance(encoders, (list, tuple)) else [encoders]
    model = trainer.model
    if model is None or model.unet is not unet:
        model = LoadedModel(text_encoders=trainer.family.adopt(encoders), vae=vae, unet=unet)
        model.extras = {"logit_scale": trainer.logit_scale, "ckpt_info": trainer.ckpt_info}
        if trainer.load_stable_diffusion_format is not None:
            model.is_stability_layout = bool(trainer.load_stable_diffusion_format)
    model.version, model.tokenizers = version, tokenizers
    return model


def choose_attention(model: LoadedModel, options: Resolved) -> None:
    """`--mem_eff_attn`, `--xformers`, `--sdpa` in this order; scaled-dot-product attention without any."""
    precision = options.precision
    model.unet.set_use_memory_efficient_attention(precision.xformers, precision.mem_eff_attn)
    if precision.sdpa and not precision.xformers:
        model.unet.set_use_sdpa(True)
    if precision.xformers and hasattr(model.vae, "set_use_memory_efficient_attention_xformers"):
        model.vae.set_use_memory_efficient_attention_xformers(True)


def freeze(model: LoadedModel) -> None:
    """No gradients for the base model, and no training mode but where checkpointing asks for it."""
    for module in (model.unet, model.vae, *model.text_encoders):
        module.requires_grad_(False)
        module.eval()


def checkpoint_and_compile(family: Family, setup: Setup) -> None:
    """Gradient checkpointing and regional compile of the U-Net, after whatever attaches itself to it."""
    precision = setup.options.precision
    unet = setup.model.unet
    wrap_model(
        unet,
        WrapPolicy(
            device=setup.processes.device,
            checkpointing_interval=precision.gradient_checkpointing_interval if precision.gradient_checkpointing else 0,
            offload_checkpoints=precision.cpu_offload_checkpointing,
            compile_backend=precision.dynamo_backend if precision.torch_compile else None,
            shapes=setup.shapes,
        ),
        family=family.name,
        repeated_block_classes=family.repeated_block_classes,
    )
    if precision.gradient_checkpointing:
        unet.train()


class CacheEncoder:
    """What the latent cache calls: pictures (B, 3, H, W) in [-1, 1] -> VAE latents (B, 4, h, w), sampled, unscaled.

    The posterior's draw is a function of seed and picture, so a cache made in parts equals one made in one go.
    """

    def __init__(self, vae: Any, draws: Draws, device: torch.device) -> None:
        self.vae = vae
        self.draws = draws
        self.device = device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        posterior = encode(self.vae, images.to(self.device), self.vae.dtype)
        return self.draws.cached_posterior(posterior, images).float()

    def exact(self, images: torch.Tensor) -> torch.Tensor:
        """The same in float32, for pictures whose latents were not finite."""
        dtype = self.vae.dtype
        move_vae(self.vae, torch.float32)
        try:
            return self(images)
        finally:
            move_vae(self.vae, dtype)
