"""Which model, and how text is read by it."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, and how text is read by it."""

    v2: bool = option(False, "")
    v_parameterization: bool = option(False, "")
    pretrained_model_name_or_path: str | None = option(None, "")
    vae: str | None = option(None, "")
    tokenizer_cache_dir: str | None = option(None, "")
    max_token_length: int | None = option(None, "", choices=(None, 150, 225))
    clip_skip: int | None = option(None, "")
    weighted_captions: bool = option(False, "")
    no_half_vae: bool = option(False, "")
