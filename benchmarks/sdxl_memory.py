"""Memory of an SDXL step, computed from shapes without a graphics card: of a LoRA, or of the whole U-Net.

    python -m benchmarks.sdxl_memory [--size 1024] [--batch 1] [--rank 16] [--full]

`--full` trains the U-Net with AdaFactor and updates inside the backward pass, checkpointing every block.

The full-size U-Net with `networks.lora` runs a forward and a backward pass on torch's meta device, in bfloat16 as
autocast has it, and every tensor is counted for as long as it lives (`library/runtime/shape_memory.py`, which trainings
use for their own estimate). Not counted: the context of the driver (about 0.5 GiB), workspaces of kernels, and what
the allocator rounds up.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch

from benchmarks.models import add_own_lora
from library.models.unet_sdxl import SdxlUNet2DConditionModel
from library.options.optimizer import OptimizerConfig
from library.runtime.shape_memory import LiveBytes, as_on_a_device
from library.runtime.wrap import WrapPolicy, wrap_model
from library.training.optimizers import make_optimizer
from library.training.stochastic_rounding import StochasticRounding

GIB = 2**30
LOW = torch.bfloat16
# Bytes that an optimizer keeps for a parameter of the network.
OPTIMIZERS = {"AdamW": 8, "8-bit AdamW": 2}
# Parameters of what may lie beside the U-Net, in millions.
TEXT_ENCODERS, VAE = 123.1 + 694.7, 83.7


def step_bytes(size: int, batch: int, rank: int, interval: int) -> tuple[int, int, int]:
    """(U-Net weights, parameters of the network, peak of a forward and backward pass beside the weights)."""
    with torch.device("meta"):
        unet = SdxlUNet2DConditionModel().requires_grad_(False)
    wrap_model(unet, WrapPolicy(device="meta", dtype=LOW), family="sdxl")
    subject = add_own_lora(unet, rank, "meta")
    wrap_model(unet, WrapPolicy(device="meta", checkpointing_interval=interval), family="sdxl")
    unet.train()
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    live = LiveBytes([*unet.parameters(), *subject.parameters])
    with live, as_on_a_device(LOW):
        unet(*inputs(size, batch)).float().square().mean().backward()
    return weights, sum(p.numel() for p in subject.parameters), live.peak


def full_step_bytes(size: int, batch: int, weights: torch.dtype) -> tuple[int, int]:
    """(U-Net weights, peak beside them of an update that is not the first, moments included)."""
    with torch.device("meta"):
        unet = SdxlUNet2DConditionModel()
    unet.to(weights).train()
    wrap_model(unet, WrapPolicy(device="meta", checkpointing_interval=1), family="sdxl")
    arguments = ["relative_step=False", "scale_parameter=False"]
    config = OptimizerConfig(
        optimizer_type="AdaFactor", optimizer_args=arguments, learning_rate=1e-5, fused_backward_pass=True
    )
    rounding = StochasticRounding(0) if weights == LOW else None
    optimizer = make_optimizer(list(unet.parameters()), config, rounding=rounding).optimizer
    live = LiveBytes(unet.parameters())
    # tensors without content draw nothing
    with mock.patch.object(StochasticRounding, "_generator", lambda *_: None), live, as_on_a_device(LOW):
        for _ in range(2):
            unet(*inputs(size, batch)).float().square().mean().backward()
            optimizer.finish_backward()
    return sum(p.numel() * p.element_size() for p in unet.parameters()), live.peak


def inputs(size: int, batch: int) -> tuple[torch.Tensor, ...]:
    """Latents, timesteps, text and sizes, as the U-Net takes them."""
    side = size // 8
    with torch.device("meta"):
        latents, times = torch.empty(batch, 4, side, side, dtype=LOW), torch.empty(batch, dtype=torch.int64)
        context, vector = torch.empty(batch, 77, 2048, dtype=LOW), torch.empty(batch, 2816, dtype=LOW)
    return latents, times, context, vector


def print_full(size: int, batches: list[int]) -> None:
    print(f"SDXL, whole U-Net, AdaFactor in the backward pass, {size}x{size}, computing in bfloat16; GiB")
    print("| batch | weights in | U-Net | step | sum |\n" + "|---" * 5 + "|")
    for batch in batches:
        for dtype in (LOW, torch.float32):
            weights, peak = full_step_bytes(size, batch, dtype)
            cells = [weights / GIB, peak / GIB, (weights + peak) / GIB]
            name = str(dtype).partition(".")[2]
            print(f"| {batch} | {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of the pictures")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], help="pictures a step")
    parser.add_argument("--rank", type=int, default=16, help="network_dim")
    parser.add_argument("--full", action="store_true", help="the whole U-Net instead of a LoRA")
    args = parser.parse_args()
    if args.full:
        print_full(args.size, args.batch)
        return
    print(f"SDXL LoRA, rank {args.rank}, {args.size}x{args.size}, bfloat16, caches for latents and text; GiB")
    print("| batch | checkpointing | U-Net | network | step | sum with AdamW | sum with 8-bit AdamW |")
    print("|---" * 7 + "|")
    for batch in args.batch:
        for interval, word in ((1, "every block"), (2, "every second block"), (0, "off")):
            weights, parameters, peak = step_bytes(args.size, batch, args.rank, interval)
            network = parameters * 4
            sums = [(weights + network + peak + parameters * kept) / GIB for kept in OPTIMIZERS.values()]
            cells = [weights / GIB, network / GIB, peak / GIB, *sums]
            print(f"| {batch} | {word} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    print(f"text encoders in bfloat16 {TEXT_ENCODERS * 2e6 / GIB:.1f}, VAE in float32 {VAE * 4e6 / GIB:.1f} GiB more")


if __name__ == "__main__":
    main()
