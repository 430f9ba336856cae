"""One picture request as the command line gives it: prompt, size, sampler, counts, output."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option
from library.options.registries import SAMPLER_NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """One picture request as the command line gives it: prompt, size, sampler, counts, output."""

    prompt: str | None = option(None, "prompt line; options such as --w 512 --d 1 may follow in it")
    from_file: str | None = option(None, "text file with one prompt line a line; wins over --prompt")
    interactive: bool = option(False, "ask for prompt lines until the input ends")
    no_preview: bool = option(False, "do not show pictures in a window in interactive mode")
    n_iter: int = option(1, "how often all prompts are gone through")
    images_per_prompt: int = option(1, "pictures per prompt line")
    batch_size: int = option(1, "pictures drawn together")
    seed: int | None = option(None, "seed of the first picture and of the seeds of the others; drawn when left out")
    iter_same_seed: bool = option(False, "use one seed for all prompts of an iteration")
    shuffle_prompts: bool = option(False, "shuffle the prompt lines in every iteration")
    W: int | None = option(None, "width in pixels; 512 when left out")
    H: int | None = option(None, "height in pixels; 512 when left out")
    steps: int = option(50, "sampler steps")
    scale: float = option(7.5, "guidance scale; 1 switches guidance off")
    negative_scale: float | None = option(None, "guidance scale of the negative prompt against the empty one")
    sampler: str = option(
        "ddim",
        "sampler by name",
        choices=SAMPLER_NAMES,
    )
    strength: float | None = option(None, "share of the steps that image to image runs, from 0 to 1; 0.8 when left out")
    image_path: str | None = option(None, "picture or folder of pictures to start from")
    mask_path: str | None = option(None, "mask or folder of masks: white is drawn anew")
    guide_image_path: list[str] | None = option(
        None, "pictures that guide the drawing (ControlNet, CLIP or VGG16 guidance)"
    )
    outdir: str = option("outputs", "folder for the pictures; made when missing")
    sequential_file_name: bool = option(False, "name the files im_000001.png and so on")
    use_original_file_name: bool = option(False, "name the files as the pictures of --image_path")
    max_embeddings_multiples: int | None = option(None, "most chunks of 75 tokens of a prompt; 1 when left out")
