"""Sample pictures while training: the same engine, text rules, sampler set-up and noise as the picture scripts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.generation.embeddings import Words
from library.generation.engine import Engine, pictures
from library.generation.output import metadata, save_picture, time_stamp
from library.generation.request import ImageRequest
from library.generation.sample_prompts import SamplePrompt, read_prompts, sample_prompt
from library.messages import UserError, log, warn_once
from library.models.family import Family, LoadedModel
from library.runtime.modes import evaluation_mode
from library.runtime.precision import autocast
from library.runtime.streams import stream_seed

__all__ = ["DrawnSample", "SamplePrompt", "draw_samples", "read_prompts", "sample_name", "sample_prompt"]

MAX_CHUNKS = 3
SUBFOLDER = "sample"


@dataclass(frozen=True, slots=True)
class DrawnSample:
    """A sample picture that was written: its place in the prompt file, prompt, seed and file."""

    index: int
    prompt: SamplePrompt
    seed: int
    path: Path


def draw_samples(
    family: Family,
    model: LoadedModel,
    prompts: Sequence[SamplePrompt],
    *,
    output_dir: str | Path,
    output_name: str | None = None,
    epoch: int | None = None,
    step: int = 0,
    sampler: str = "ddim",
    clip_skip: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
    modules: Sequence[nn.Module] = (),
    words: Words | None = None,
) -> list[DrawnSample]:
    """Draw the pictures of a prompt file with the weights as they are now, into `<output_dir>/sample`.

    A prompt that cannot be drawn is reported and left out: a training does not stop for it. Every module is
    put into evaluation mode and onto the device for the drawing, and back to where it was afterwards; the training's
    random generators are not touched.

    Args:
        family, model: with the modules that train (wrapped or not).
        output_name: first part of the file names, or None.
        epoch: number of the epoch that just ended, or None after a step.
        step: optimizer steps done.
        sampler: for prompts that name none.
        dtype: of noise and latents.
        autocast_dtype: for the text encoders and the U-Net; None for none. The VAE decodes without it.
        seed: the run's; a prompt without a seed gets one from it that changes with every step.
        modules: further ones that take part, networks for instance.
        words: of embeddings that the model holds.
    """
    engine = Engine(
        family,
        model,
        device=device,
        dtype=dtype,
        sampler=sampler,
        clip_skip=clip_skip,
        max_chunks=MAX_CHUNKS,
        words=words,
    )
    taking_part = [*model.text_encoders, model.unet, model.vae, *modules]
    drawn = []
    with lent_for_drawing(taking_part, device):
        for index, prompt in enumerate(prompts):
            request = _request(family, prompt, seed=seed, step=step, index=index)
            name = sample_name(output_name, epoch, step, index, prompt.seed)
            path = Path(output_dir) / SUBFOLDER / name
            try:
                with autocast(device, autocast_dtype):
                    latents = engine.latents([request])
                image = pictures(engine.decode(latents))[0]
            except (UserError, torch.cuda.OutOfMemoryError) as error:
                log.error(f"sample picture {index} left out: {error}")
                continue
            save_picture(image, path, metadata(request, request.sampler or sampler))
            drawn.append(DrawnSample(index, prompt, request.seed, path))
    return drawn


def sample_name(output_name: str | None, epoch: int | None, step: int, index: int, seed: int | None) -> str:
    """File name of a sample picture: name, time, epoch or step, place in the prompt file, seed if one was given."""
    parts = [
        output_name,
        time_stamp(),
        f"{step:06d}" if epoch is None else f"e{epoch:06d}",
        f"{index:02d}",
        None if seed is None else str(seed),
    ]
    return "_".join(part for part in parts if part) + ".png"


def _request(family: Family, prompt: SamplePrompt, *, seed: int, step: int, index: int) -> ImageRequest:
    width, height = prompt.size(family.default_size, family.size_multiple)
    own_seed = prompt.seed
    if own_seed is None:
        own_seed = stream_seed(seed, "sample", step, index) % 2**32
        log.info(f"sample picture {index}: seed {own_seed}")
    if prompt.control_image is not None:
        warn_once("control images of sample prompts have no effect in this training")
    return ImageRequest(
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt or "",
        width=width,
        height=height,
        steps=prompt.steps,
        scale=float(prompt.scale),
        seed=own_seed,
        sampler=prompt.sampler,
        index=index,
    )


@contextlib.contextmanager
def lent_for_drawing(modules: Sequence[nn.Module], device: str | torch.device) -> Iterator[None]:
    """Modules in evaluation mode on the device; afterwards each is in its own mode on its own device again."""
    places = [(module, _device_of(module)) for module in modules]
    with evaluation_mode(modules):
        try:
            for module, place in places:
                if place is not None and place != torch.device(device):
                    module.to(device)
            yield
        finally:
            for module, place in places:
                if place is not None and place != _device_of(module):
                    module.to(place)


def _device_of(module: nn.Module) -> torch.device | None:
    parameter: Any = next(module.parameters(), None)
    return None if parameter is None else parameter.device
