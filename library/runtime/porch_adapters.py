"""Old functions around devices and processes that third parties call with a script's namespace."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from library.messages import UserError
from library.runtime import precision
from library.runtime.attention import require_xformers
from library.runtime.devices import is_available
from library.runtime.processes import start_processes

HAS_CUDA, HAS_XPU, HAS_MPS = (is_available(kind) for kind in ("cuda", "xpu", "mps"))


def prepare_accelerator(args: Any) -> Any:
    """An `accelerate.Accelerator` as the namespace's logging, precision and accumulation options ask."""
    log_with = getattr(args, "log_with", None)
    logging_dir = getattr(args, "logging_dir", None)
    project = None
    if logging_dir:
        prefix = getattr(args, "log_prefix", None) or ""
        project = os.path.join(logging_dir, prefix + time.strftime("%Y%m%d%H%M%S", time.localtime()))
        log_with = log_with or "tensorboard"
    elif log_with in ("tensorboard", "all"):
        raise UserError(f"--log_with {log_with} needs a folder", "give --logging_dir")
    return start_processes(
        mixed_precision=getattr(args, "mixed_precision", None) or "no",
        gradient_accumulation_steps=getattr(args, "gradient_accumulation_steps", None) or 1,
        log_with=log_with,
        project_dir=project,
        ddp_timeout=getattr(args, "ddp_timeout", None),
    ).accelerator


def prepare_dtype(args: Any) -> tuple[Any, Any]:
    """(dtype of frozen weights, dtype of saved files or None)."""
    words = getattr(args, "mixed_precision", None), getattr(args, "save_precision", None)
    return precision.weight_dtype(words[0]), precision.save_dtype(words[1])


def replace_unet_modules(unet: Any, mem_eff_attn: bool, xformers: bool, sdpa: bool) -> None:
    """Set a U-Net's attention; the first of the three that is given wins, and none changes nothing."""
    if mem_eff_attn:
        unet.set_use_memory_efficient_attention(False, True)
    elif xformers:
        require_xformers()
        unet.set_use_memory_efficient_attention(True, False)
    elif sdpa:
        unet.set_use_sdpa(True)


def patch_accelerator_for_fp16_training(accelerator: Any) -> None:
    """Let the accelerator's gradient scaler unscale float16 gradients."""
    precision.allow_half_gradients(accelerator.scaler)


def init_ipex() -> None:
    """Nothing to do: torch itself supports Intel XPUs."""


def ipex_init() -> tuple[bool, None]:
    """(done, error): there is nothing to do."""
    return True, None


def str_to_dtype(s: str | None, default_dtype: Any = None) -> Any:
    """`fp32`, `float16`, `bf16`, `fp8_e4m3fn`, ... as a torch dtype; None and words unknown here give the default."""
    word = (s or "").lower().removeprefix("torch.")
    if word in ("fp8_e4m3fn", "fp8_e5m2"):
        return getattr(torch, word.replace("fp8", "float8"))
    named = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}.get(word, word)
    return precision.dtype_of(named) if named in ("float", "fp32", "fp16", "bf16") else default_dtype
