"""Pictures to latents inside the step, for batches whose latents are not cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from library.messages import UserError

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.training.draws import Draws, Place


class LatentEncoder:
    """Latents of a batch, scaled for the U-Net, float32 on the device.

    Args:
        vae: AutoencoderKL on the device, or None when every batch brings latents.
        scale: a function that multiplies VAE latents by the family's factor.
        draws: gives the posterior's draw.
        device: where latents go.
        batch_size: pictures per VAE call, 0 for all at once.
    """

    def __init__(self, vae: Any, scale: Any, draws: Draws, device: torch.device, batch_size: int = 0) -> None:
        self.vae = vae
        self.scale = scale
        self.draws = draws
        self.device = device
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, batch: Batch, place: Place) -> torch.Tensor:
        """(B, 4, h, w) float32."""
        latents = batch.get("latents")
        if latents is not None:
            return self.scale(latents.to(self.device, non_blocking=True).float())
        images = batch["images"].to(self.device, non_blocking=True)
        latents = self.draws.posterior(place, encode(self.vae, images, self.vae.dtype, self.batch_size))
        if self.vae.dtype == torch.float16 and not torch.isfinite(latents).all():
            latents = self._encode_in_float32(images, batch, place)
        return self.scale(latents.float())

    def _encode_in_float32(self, images: torch.Tensor, batch: Batch, place: Place) -> torch.Tensor:
        dtype = self.vae.dtype
        move_vae(self.vae, torch.float32)
        latents = self.draws.posterior(place, encode(self.vae, images, torch.float32, self.batch_size))
        move_vae(self.vae, dtype)
        finite = torch.isfinite(latents).flatten(1).all(1).tolist()
        if not all(finite):
            keys = [key for key, good in zip(batch.get("image_keys") or [], finite, strict=False) if not good]
            raise UserError(
                f"the VAE gives no finite latents for {', '.join(keys) or 'a picture'}, in float32 either",
                "look at that picture, or replace the VAE with --vae",
            )
        return latents


def move_vae(vae: Any, *where: Any) -> None:
    """Move or cast the VAE; diffusers' own `to` warns of half precision at every call."""
    torch.nn.Module.to(vae, *where)


class Posterior:
    """The posteriors of several VAE calls as one distribution."""

    def __init__(self, parts: list[Any]) -> None:
        self.mean = torch.cat([p.mean for p in parts])
        self.std = torch.cat([p.std for p in parts])

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        device = generator.device if generator is not None else self.mean.device
        draw = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * draw.to(self.mean.device)


def encode(vae: Any, images: torch.Tensor, dtype: torch.dtype, batch_size: int = 0) -> Posterior:
    """Posterior of pictures (B, 3, H, W) in [-1, 1], computed `batch_size` at a time."""
    parts = images.to(dtype).split(batch_size) if batch_size else [images.to(dtype)]
    return Posterior([vae.encode(part).latent_dist for part in parts])
