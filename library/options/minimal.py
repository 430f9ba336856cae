"""The short SDXL picture script: two prompts, networks, a file."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class MinimalConfig:
    """One SDXL picture of 1024x1024 pixels with a prompt for each text encoder."""

    ckpt_path: str | None = option(
        None, "model: a checkpoint file, a diffusers folder or a Hugging Face name", required=True
    )
    prompt: str = option("A photo of a cat", "prompt, taken as it is: brackets have no meaning")
    prompt2: str | None = option(None, "prompt of the second text encoder; --prompt when left out")
    negative_prompt: str = option("", "what the picture should not show")
    output_dir: str = option(".", "folder for the picture; it must exist")
    lora_weights: list[str] = option([], "LoRA files that are merged into the model, each as FILE or FILE;MULTIPLIER")
    interactive: bool = option(False, "ask for prompts and seed until the prompt is empty")
