"""Kernels that a LoRA step of full-size SD 1.5 launches, counted on meta tensors (nothing is computed).

Attention counts as what it decomposes to there, the same for both sides.

python -m benchmarks.kernels
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.counting import count
from benchmarks.models import (
    SD15,
    Subject,
    add_own_lora,
    add_peft_lora,
    backward,
    batch_for,
    diffusers_unet,
    forward,
    own_unet,
)
from library.models.unet_config import UNetConfig

RANK = 16


def own_kernels(config: UNetConfig = SD15) -> dict[str, float]:
    """Counts of this project's U-Net with `networks.lora`; see `kernel_counts`."""
    return kernel_counts(config, own_unet, lambda unet: add_own_lora(unet, RANK, "meta"))


def peft_kernels(config: UNetConfig = SD15) -> dict[str, float]:
    """Counts of diffusers' U-Net with peft's LoRA; see `kernel_counts`."""
    return kernel_counts(config, diffusers_unet, lambda unet: add_peft_lora(unet, RANK))


def kernel_counts(
    config: UNetConfig, make: Callable[[UNetConfig, str], Any], attach: Callable[[Any], Subject]
) -> dict[str, float]:
    """Kernels of a forward pass, of forward and backward, and what each adapted module adds to the forward pass."""
    with torch.device("meta"):
        batch = batch_for(config, 1, 64, "meta")
        unet = make(config, "meta")
        forward(Subject("", unet, []), batch)  # once for what is made at the first call and kept
        bare = count(lambda: forward(Subject("", unet, []), batch)).kernels
        subject = attach(unet)
        adapted = count(lambda: forward(subject, batch)).kernels
        whole = count(lambda: backward(subject, batch)).kernels
    return {
        "modules": subject.modules,
        "forward without adapters": bare,
        "forward": adapted,
        "added per module": (adapted - bare) / subject.modules,
        "forward and backward": whole,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    ours, theirs = own_kernels(), peft_kernels()
    print(f"SD 1.5, 64x64 latents, rank {RANK}: this project / diffusers + peft")
    for what, number in ours.items():
        print(
            f"{what}: {number:g} / {theirs[what]:g}" + (f" (ratio {number / theirs[what]:.3f})" if theirs[what] else "")
        )


if __name__ == "__main__":
    main()
