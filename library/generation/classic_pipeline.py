"""The sampling pipeline as other programs construct and call it; a thin front of the engine's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.diffusion.samplers import set_steps
from library.generation.denoise import Guidance, denoise
from library.generation.engine import pictures, size_batch
from library.generation.passes import LATENT_CHANNELS, PIXELS_PER_LATENT
from library.generation.request import SizeCondition
from library.generation.text import PromptReader, encode_prompts
from library.messages import UserError
from library.models.family import TextCondition, family
from library.models.vae import decode_latents
from library.runtime.devices import default_generator

if TYPE_CHECKING:
    from PIL.Image import Image


class StableDiffusionLongPromptWeightingPipeline:
    """Draws latents from prompts with emphasis and any length, with a diffusers scheduler of the caller's.

    Args:
        vae, text_encoder, tokenizer, unet: the model's parts.
        scheduler: of diffusers; `set_timesteps` is called at every call of the pipeline.
        safety_checker, feature_extractor, requires_safety_checker: taken for old callers, without effect.
        clip_skip: layer of the text encoder, from its end; None or 1 for the last.
    """

    family_name = "sd"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        requires_safety_checker: bool = True,
        clip_skip: int | None = 1,
    ) -> None:
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.unet = unet
        self.scheduler = scheduler
        self.safety_checker = safety_checker
        self.feature_extractor = feature_extractor
        self.clip_skip = clip_skip
        self.family = family(self.family_name)

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return next(self.unet.parameters()).device

    def to(self, device: str | torch.device) -> StableDiffusionLongPromptWeightingPipeline:
        """Move all parts."""
        for module in (self.vae, self.unet, *_as_list(self.text_encoder)):
            module.to(device)
        return self

    def set_progress_bar_config(self, **_: Any) -> None:
        """Taken for old callers: this pipeline draws no bar."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        strength: float = 0.8,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: torch.Tensor | None = None,
        max_embeddings_multiples: int = 3,
        output_type: str = "pil",
        return_dict: bool = True,
        controlnet: Any = None,
        controlnet_image: Any = None,
        callback: Callable[[int, Any, torch.Tensor], None] | None = None,
        is_cancelled_callback: Callable[[], bool] | None = None,
        callback_steps: int = 1,
    ) -> torch.Tensor:
        """Draw latents (B, 4, H/8, W/8); `latents_to_image` makes pictures of them.

        Args:
            generator: one for all pictures, a list with one each, or None for torch's global one.
            latents: unit noise to start from.
            output_type, return_dict: without effect; latents are returned.
        """
        if image is not None or mask_image is not None:
            raise UserError("image to image in this pipeline is not supported yet", "leave image and mask_image out")
        if controlnet is not None:
            raise UserError("ControlNet in this pipeline is not supported yet", "leave controlnet out")
        if eta:
            raise UserError(f"eta {eta} has no effect on these samplers", "leave it out")
        prompts = _repeated(prompt, num_images_per_prompt)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives = [negative_prompt or ""] * len(prompts)
        else:
            negatives = _repeated(negative_prompt, num_images_per_prompt)
        if len(negatives) != len(prompts):
            raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} pictures", "give one per prompt")
        guidance = Guidance(guidance_scale)
        text = self._encode([*negatives, *prompts] if guidance.parts == 2 else prompts, max_embeddings_multiples)
        generators = self._generators(generator, len(prompts))
        start = self._start(latents, generators, height, width, text.hidden[0].dtype)
        set_steps(self.scheduler, num_inference_steps)

        own, other = SizeCondition().rows(height, width)
        sizes = size_batch(([other] * len(prompts) if guidance.parts == 2 else []) + [own] * len(prompts), self.device)

        def predict(model_input: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.family.predict(self.unet, model_input, timesteps, text, sizes)

        def on_step(index: int, timestep: torch.Tensor, current: torch.Tensor) -> bool:
            if callback is not None and index % callback_steps == 0:
                callback(index, timestep, current)
            return is_cancelled_callback is not None and is_cancelled_callback()

        return denoise(predict, self.scheduler, start * self.scheduler.init_noise_sigma, guidance, generators, on_step)

    def text2img(self, prompt: str | Sequence[str], **options: Any) -> torch.Tensor:
        """The call without a picture."""
        return self(prompt=prompt, **options)

    @torch.no_grad()
    def latents_to_image(self, latents: torch.Tensor) -> list[Image]:
        """Latents in the model's scale -> 8-bit pictures."""
        return pictures(decode_latents(self.vae, latents / self.family.latent_scale).float())

    def _encode(self, texts: list[str], max_chunks: int) -> TextCondition:
        reader = PromptReader(_as_list(self.tokenizer), max_chunks)
        encoders = _as_list(self.text_encoder)
        return encode_prompts(self.family, encoders, reader, texts, clip_skip=self.clip_skip, device=self.device)

    def _generators(self, generator: Any, count: int) -> list[torch.Generator]:
        if isinstance(generator, (list, tuple)):
            return list(generator)
        return [generator or default_generator(self.device)] * count

    def _start(
        self,
        latents: torch.Tensor | None,
        generators: Sequence[torch.Generator],
        height: int,
        width: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if latents is not None:
            return latents.to(self.device, dtype)
        shape = (LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        drawn = [torch.randn(shape, generator=g, device=g.device, dtype=dtype) for g in generators]
        return torch.stack(drawn).to(self.device)


class SdxlStableDiffusionLongPromptWeightingPipeline(StableDiffusionLongPromptWeightingPipeline):
    """The same for SDXL: `text_encoder` and `tokenizer` are lists of two; sizes are the picture's own, uncropped."""

    family_name = "sdxl"


def get_weighted_text_embeddings(
    pipe: StableDiffusionLongPromptWeightingPipeline,
    prompt: str | Sequence[str],
    uncond_prompt: str | Sequence[str] | None = None,
    max_embeddings_multiples: int = 3,
    clip_skip: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states (B, 77 n, D) of prompts and of negative prompts, n chunks for both."""
    prompts = _repeated(prompt, 1)
    negatives = [] if uncond_prompt is None else _repeated(uncond_prompt, 1)
    reader = PromptReader(_as_list(pipe.tokenizer), max_embeddings_multiples)
    encoders = _as_list(pipe.text_encoder)
    text = encode_prompts(
        pipe.family, encoders, reader, [*prompts, *negatives], clip_skip=clip_skip, device=pipe.device
    )
    states = torch.cat(text.hidden, dim=-1)
    return states[: len(prompts)], states[len(prompts) :] if negatives else None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _repeated(texts: str | Sequence[str], times: int) -> list[str]:
    return [text for text in ([texts] if isinstance(texts, str) else texts) for _ in range(times)]
