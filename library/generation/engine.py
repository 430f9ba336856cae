"""The engine: requests in, pictures out. The picture scripts and the sample pictures of a training both use it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from library.generation.denoise import OnStep
from library.generation.embeddings import Words
from library.generation.networks import Networks
from library.generation.passes import guidance_of, text_to_image
from library.generation.request import ImageRequest, SizeCondition
from library.generation.text import PromptReader, encode_prompts
from library.messages import UserError, warn_once
from library.models.family import Family, LoadedModel, TextCondition
from library.models.vae import decode_latents

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.data.batch import Batch


class Engine:
    """Draws pictures with one opened model.

    Args:
        family: of the model.
        model: its modules, already on the device and in their number formats.
        device: where noise is drawn and latents live.
        dtype: of noise, latents and text states; another one gives other pictures for the same seed.
        sampler: for requests that name none.
        clip_skip: layer of the text encoder, from the end; None for the family's own.
        max_chunks: chunks of 75 tokens that a prompt may fill.
        networks: applied networks, for their multipliers.
        vae_batch_size: pictures that the VAE decodes at once: a number, a share of the batch below 1, None for all.
        facts: about the run, for the metadata of every picture.
        noise_device: where noise is drawn, in float32 then; None for `device` and `dtype`.
        words: of embedding files, in the model's tokenizers and text encoders already.
    """

    def __init__(
        self,
        family: Family,
        model: LoadedModel,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        sampler: str = "ddim",
        clip_skip: int | None = None,
        max_chunks: int = 1,
        networks: Networks | None = None,
        vae_batch_size: float | None = None,
        facts: Mapping[str, str] | None = None,
        noise_device: str | torch.device | None = None,
        words: Words | None = None,
    ) -> None:
        self.family = family
        self.model = model
        self.device = torch.device(device)
        self.dtype = dtype
        self.sampler = sampler
        self.clip_skip = clip_skip
        self.networks = networks or Networks()
        self.vae_batch_size = vae_batch_size
        self.noise_device = noise_device
        self._facts = dict(facts or {})
        self.reader = PromptReader(model.tokenizers, max_chunks, words)

    def batch_key(self, request: ImageRequest) -> Hashable:
        """What requests must have in common to be drawn in one batch, the length of their text included."""
        return (request.batch_key, self.reader.chunk_count(_texts(request)))

    def facts(self, request: ImageRequest) -> dict[str, str]:
        """What the picture's metadata say besides the request: model, networks with their multipliers."""
        networks = self.networks.description(request.network_multipliers)
        return {**self._facts, "networks": networks} if networks else dict(self._facts)

    def check(self, request: ImageRequest) -> None:
        """Refuse a request that this model cannot draw.

        Raises:
            UserError: naming the nearest value that works.
        """
        multiple = self.family.size_multiple
        for name, side in (("width", request.width), ("height", request.height)):
            if side < multiple or side % multiple:
                nearest = max(multiple, round(side / multiple) * multiple)
                raise UserError(f"{name} {side} is not a multiple of {multiple}", f"use {nearest}")
        if request.steps < 1:
            raise UserError(f"{request.steps} steps", "use at least 1")
        if request.strength is not None and not 0 <= request.strength <= 1:
            raise UserError(f"strength {request.strength} is outside 0..1", "use a value between 0 and 1")
        if " AND " in request.prompt:
            raise UserError("AND in a prompt belongs to regional networks", "leave it out, or write `and`")
        if request.negative_scale is not None and request.scale <= 1.0:
            warn_once("the negative scale has no effect: it needs guidance, a scale above 1")

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep | None = None) -> list[Image]:
        """Draw one batch of requests with equal `batch_key`, pictures in the order of the requests."""
        return pictures(self.decode(self.latents(requests, on_step)))

    @torch.no_grad()
    def latents(
        self, requests: Sequence[ImageRequest], on_step: OnStep | None = None, text: TextCondition | None = None
    ) -> torch.Tensor:
        """The batch's latents (B, 4, H/8, W/8) in the model's scale.

        Args:
            on_step: told about each model call; may stop the batch.
            text: what `encode` gave for these requests, or None to encode now.
        """
        for request in requests:
            self.check(request)
        self.networks.prepare_batch(requests[0].network_multipliers)
        text = self.encode(requests) if text is None else text
        sizes = self._sizes(requests)

        def predict(model_input: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.family.predict(self.model.unet, model_input, timesteps, text, sizes)

        return text_to_image(
            predict,
            requests,
            sampler_name=requests[0].sampler or self.sampler,
            v_prediction=self.model.prediction_type == "v_prediction",
            device=self.device,
            dtype=self.dtype,
            zero_terminal_snr=bool(self.model.extras.get("zero_terminal_snr")),
            noise_device=self.noise_device,
            on_step=on_step,
        )

    @torch.no_grad()
    def encode(self, requests: Sequence[ImageRequest]) -> TextCondition:
        """The batch's text as rows of the model: negatives, prompts, empty prompts, as many as guidance needs."""
        prompts = [request.prompt for request in requests]
        parts = [[request.negative_prompt for request in requests], prompts, [""] * len(prompts)]
        count = guidance_of(requests[0]).parts
        texts = prompts if count == 1 else [text for part in parts[:count] for text in part]
        return encode_prompts(
            self.family,
            self.model.text_encoders,
            self.reader,
            texts,
            clip_skip=self.clip_skip,
            device=self.device,
            dtype=self.dtype,
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 4, h, w) -> decoder output (B, 3, 8 h, 8 w), float32, about -1..1."""
        vae = self.model.vae
        images = self._decode(latents)
        if vae.dtype == torch.float16 and not torch.isfinite(images).all():
            warn_once("the VAE overflows in float16: decoding again in float32 (slower); --bf16 avoids it")
            vae.to(torch.float32)
            images = self._decode(latents)
            vae.to(torch.float16)
        return images

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        size = vae_slice(len(latents), self.vae_batch_size)
        return decode_latents(self.model.vae, latents / self.family.latent_scale, slice_size=size).float()

    def _sizes(self, requests: Sequence[ImageRequest]) -> Batch:
        """Size conditioning of the rows, for families that have it."""
        sides = [(request.sizes or SizeCondition()).rows(request.height, request.width) for request in requests]
        own, other = [side[0] for side in sides], [side[1] for side in sides]
        count = guidance_of(requests[0]).parts
        rows = own if count == 1 else [row for part in (other, own, other)[:count] for row in part]
        return size_batch(rows, self.device)


def _texts(request: ImageRequest) -> list[str]:
    if guidance_of(request).parts == 1:
        return [request.prompt]
    return [request.prompt, request.negative_prompt]


def size_batch(rows: Sequence[Sequence[int]], device: str | torch.device) -> Batch:
    """Rows of `SizeCondition.rows` in the form that families read sizes from."""
    table = torch.tensor(rows, device=device)
    return {"original_sizes_hw": table[:, 0:2], "crop_top_lefts": table[:, 2:4], "target_sizes_hw": table[:, 4:6]}


def vae_slice(batch: int, wanted: float | None) -> int:
    """Pictures that the VAE handles at once, from `--vae_batch_size` (below 1: a share of the batch)."""
    if wanted is None:
        return batch
    size = int(wanted) if wanted >= 1 else max(1, int(batch * wanted))
    return min(size, batch)


def pictures(images: torch.Tensor) -> list[Image]:
    """Decoder output (B, 3, H, W), -1..1 -> 8-bit pictures, rounded half to even."""
    from PIL import Image

    pixels = (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
