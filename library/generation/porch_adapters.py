"""Helpers of the picture script that other programs call (`gen_img_diffusers`); nothing inside uses these."""

from __future__ import annotations

import random
from typing import Any, cast

from library.prompts.dynamic import expand


def handle_dynamic_prompt_variants(prompt: str, repeat_count: int) -> list[str]:
    """Variants of a prompt with groups, drawn from Python's global generator; one without groups alone."""
    return expand(prompt, repeat_count, cast(random.Random, random))


def replace_vae_modules(vae: Any, mem_eff_attn: bool, xformers: bool, sdpa: bool) -> None:
    """Set a VAE's attention; torch's own is what it has without this."""
    if xformers and not mem_eff_attn:
        vae.set_use_memory_efficient_attention_xformers(True)
