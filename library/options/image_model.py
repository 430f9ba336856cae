"""Models, networks and memory of the picture scripts."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageModelConfig:
    """Models, networks and memory of the picture scripts."""

    ckpt: str | None = option(None, "")
    v2: bool = option(False, "")
    v_parameterization: bool = option(False, "")
    vae: str | None = option(None, "")
    tokenizer_cache_dir: str | None = option(None, "")
    clip_skip: int | None = option(None, "")
    fp16: bool = option(False, "")
    bf16: bool = option(False, "")
    xformers: bool = option(False, "")
    sdpa: bool = option(False, "")
    diffusers_xformers: bool = option(False, "")
    opt_channels_last: bool = option(False, "")
    vae_batch_size: float | None = option(None, "")
    vae_slices: int | None = option(None, "")
    network_module: list[str] | None = option(None, "")
    network_weights: list[str] | None = option(None, "")
    network_mul: list[float] | None = option(None, "")
    network_args: list[str] | None = option(None, "")
    network_show_meta: bool = option(False, "")
    network_merge: bool = option(False, "")
    network_merge_n_models: int | None = option(None, "")
    network_pre_calc: bool = option(False, "")
    network_regional_mask_max_color_codes: int | None = option(None, "")
    textual_inversion_embeddings: list[str] | None = option(None, "")
    XTI_embeddings: list[str] | None = option(None, "")
