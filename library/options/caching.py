"""Caching before a training: what the tools that fill the caches take beside the options of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.declare import option

if TYPE_CHECKING:
    from library.options.parser import Resolved

# Concerns of a training that caches do not depend on, and the options of others.
_IDLE_CONCERNS = ("saving", "metadata", "objective", "samples", "logging", "hub")
_IDLE = frozenset(
    {
        *("max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "resume", "skip_existing"),
        *("gradient_checkpointing", "full_fp16", "full_bf16", "fp8_base", "torch_compile", "dynamo_backend"),
        *("mem_eff_attn", "xformers", "sdpa", "lowram", "highvram", "clip_skip", "v_parameterization"),
        *("persistent_data_loader_workers", "ddp_gradient_as_bucket_view", "ddp_static_graph"),
        "disable_mmap_load_safetensors",
    }
)
_IDLE_IN = {
    "tools/cache_latents.py": frozenset(
        {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size"}
    ),
    "tools/cache_text_encoder_outputs.py": frozenset({"vae", "vae_batch_size", "seed"}),
}
# Where a data set that is shown goes, and which pictures are masks.
_ACT_ANYWAY = frozenset({"output_dir", "masked_loss"})


@dataclass(frozen=True, kw_only=True, slots=True)
class CachingConfig:
    """What is cached, and what is done with the cache files that are there."""

    sdxl: bool = option(False, "the model is an SDXL model")
    skip_existing: bool = option(False, "no effect: files that hold are always kept; see --skip_cache_check")
    text_encoder_batch_size: int | None = option(None, "captions per call of the text encoders; 16 when left out")
    verify: bool = option(False, "make nothing: read every cache file of the data sets and name those that do not hold")
    prune: bool = option(
        False,
        "make nothing: delete cache files that are broken, whose picture or caption changed or is gone, or that a "
        "killed run left",
    )


def idle_options(options: Resolved) -> list[str]:
    """Given options that change nothing about caches."""
    idle = _IDLE | _IDLE_IN.get(options.script, frozenset())
    for concern in _IDLE_CONCERNS:
        if concern in options:
            idle |= frozenset(type(options.configs[concern]).__dataclass_fields__)
    return sorted((idle & options.given) - _ACT_ANYWAY)
