"""Sample pictures as other programs' training scripts ask for them; nothing inside uses these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.generation.classic_pipeline import (
    SdxlStableDiffusionLongPromptWeightingPipeline,
    StableDiffusionLongPromptWeightingPipeline,
)
from library.generation.sampling import SamplePrompt, draw_samples, read_prompts, sample_name
from library.messages import UserError, log
from library.models.family import LoadedModel, family
from library.prompts.line_options import SAMPLE_ITEMS, parse_line
from library.runtime.precision import weight_dtype
from library.training.samples import is_due


def sample_images(*args: Any, **kwargs: Any) -> None:
    """`sample_images_common` for SD 1.x and 2.x."""
    sample_images_common(StableDiffusionLongPromptWeightingPipeline, *args, **kwargs)


def sample_images_sdxl(*args: Any, **kwargs: Any) -> None:
    """`sample_images_common` for SDXL; tokenizer and text encoder are lists of two."""
    sample_images_common(SdxlStableDiffusionLongPromptWeightingPipeline, *args, **kwargs)


def sample_images_common(
    pipe_class: Any,
    accelerator: Any,
    args: Any,
    epoch: int | None,
    steps: int,
    device: Any,
    vae: Any,
    tokenizer: Any,
    text_encoder: Any,
    unet: Any,
    prompt_replacement: tuple[str, str] | None = None,
    controlnet: Any = None,
) -> None:
    """Draw the sample pictures of `args.sample_prompts` if this step or epoch is one for them.

    Args:
        pipe_class: says the model family (`family_name`).
        tokenizer, text_encoder: one, or a list for families with several.
        prompt_replacement: text that stands for another one in prompts.
    """
    if not is_due(args, epoch, steps):
        return
    if not args.sample_prompts or not Path(args.sample_prompts).is_file():
        log.warning(f"no sample pictures: there is no prompt file {args.sample_prompts}")
        return
    if controlnet is not None:
        raise UserError("sample pictures with ControlNet are not supported yet", "leave --sample_prompts out")
    if not accelerator.is_main_process:
        return
    model = LoadedModel(
        text_encoders=_as_list(text_encoder),
        vae=vae,
        unet=accelerator.unwrap_model(unet),
        tokenizers=_as_list(tokenizer),
        prediction_type="v_prediction" if args.v_parameterization else "epsilon",
    )
    prompts = [_replaced(prompt, prompt_replacement) for prompt in read_prompts(args.sample_prompts)]
    draw_samples(
        family(getattr(pipe_class, "family_name", "sd")),
        model,
        prompts,
        output_dir=args.output_dir,
        output_name=args.output_name,
        epoch=epoch,
        step=steps,
        sampler=args.sample_sampler,
        clip_skip=args.clip_skip,
        device=device,
        autocast_dtype=weight_dtype(accelerator.mixed_precision),
        seed=args.seed or 0,
    )


def sample_image_inference(
    accelerator: Any,
    args: Any,
    pipeline: Any,
    save_dir: str,
    prompt_dict: dict[str, Any],
    epoch: int | None,
    steps: int,
    prompt_replacement: tuple[str, str] | None = None,
    controlnet: Any = None,
) -> None:
    """Draw one picture of a table of `load_prompts` with a pipeline of `train_util`, into `save_dir`."""
    prompt = _replaced(_prompt_of(prompt_dict), prompt_replacement)
    width, height = prompt.size(pipeline.family.default_size, pipeline.family.size_multiple)
    seed = prompt.seed
    generator = None if seed is None else torch.Generator(device=pipeline.device).manual_seed(seed)
    with accelerator.autocast():
        latents = pipeline(
            prompt.prompt,
            negative_prompt=prompt.negative_prompt,
            height=height,
            width=width,
            num_inference_steps=prompt.steps,
            guidance_scale=prompt.scale,
            generator=generator,
            controlnet=controlnet,
        )
    image = pipeline.latents_to_image(latents)[0]
    name = sample_name(args.output_name, epoch, steps, prompt_dict.get("enum", 0), seed)
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    image.save(Path(save_dir) / name)


def load_prompts(prompt_file: str) -> list[dict[str, Any]]:
    """A prompt file as a list of tables with the keys of its objects, `enum` being the place in the file."""
    return [{**_table(prompt), "enum": index} for index, prompt in enumerate(read_prompts(prompt_file))]


def line_to_prompt_dict(line: str) -> dict[str, Any]:
    """A prompt line (`a cat --w 512 --d 7`) as a table of what it says, with the keys of a prompt file's objects."""
    parsed = parse_line(line, SAMPLE_ITEMS)
    return {"prompt": parsed.prompt, **_renamed(parsed.values)}


def _table(prompt: SamplePrompt) -> dict[str, Any]:
    return {k: v for k, v in _renamed(dataclasses.asdict(prompt)).items() if v is not None}


# Field of a sample prompt -> key of a prompt file's objects.
_KEYS = {"steps": "sample_steps", "sampler": "sample_sampler", "control_image": "controlnet_image"}


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_KEYS.get(key, key): value for key, value in values.items()}


def _prompt_of(table: Mapping[str, Any]) -> SamplePrompt:
    fields = {field.name: _KEYS.get(field.name, field.name) for field in dataclasses.fields(SamplePrompt)}
    return SamplePrompt(**{name: table[key] for name, key in fields.items() if key in table})


def _replaced(prompt: SamplePrompt, replacement: tuple[str, str] | None) -> SamplePrompt:
    if replacement is None:
        return prompt
    negative = prompt.negative_prompt and prompt.negative_prompt.replace(*replacement)
    return dataclasses.replace(prompt, prompt=prompt.prompt.replace(*replacement), negative_prompt=negative)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
