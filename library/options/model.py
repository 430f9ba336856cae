"""Which model, and how text is read by it."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, and how text is read by it."""

    v2: bool = option(False, "the model is Stable Diffusion 2.x")
    v_parameterization: bool = option(False, "the model predicts velocity (SD 2.x 768 and other v models)")
    pretrained_model_name_or_path: str | None = option(
        None, "model to start from: a checkpoint file, a diffusers folder or a Hugging Face name"
    )
    vae: str | None = option(
        None, "VAE that replaces the model's own: a file, a diffusers folder or a Hugging Face name"
    )
    tokenizer_cache_dir: str | None = option(
        None, "folder that holds tokenizers, used instead of the shipped vocabulary"
    )
    max_token_length: int | None = option(
        None, "length of captions in tokens: 75 when left out, 150 or 225", choices=(None, 150, 225)
    )
    clip_skip: int | None = option(None, "take the text encoder's output N layers from its end (1 = last; SD 1.x only)")
    weighted_captions: bool = option(False, "read weights such as (word:1.2) and [word] in captions")
    no_half_vae: bool = option(
        False, "run the VAE in float32 whatever --mixed_precision says; a remedy for black or non-finite pictures"
    )
