"""SDXL LoRA training at full size, random weights, beside diffusers + peft in the same run; made for a GPU.

    python -m benchmarks.sdxl_step                       (the whole table, on the best device of this machine)
    python -m benchmarks.sdxl_step --size tiny --device cpu   (does it run)

Latents and text are given (cached), as in a run with both caches. A line a setting: seconds a step, pictures a
second, peak memory, kernels a step, share of the matrix peak that this card reaches in bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.counting import count
from benchmarks.models import PEFT_TARGETS, Subject, compare, stopwatch
from library.models import unet_sdxl
from library.models.unet_config import SdxlUNetConfig
from library.runtime.devices import empty_cache, memory_stats, pick_device, reset_peak_memory
from library.runtime.precision import autocast
from library.runtime.wrap import WrapPolicy, wrap_model

SIZES = {
    "full": (SdxlUNetConfig(), 128, 16),
    "tiny": (
        SdxlUNetConfig(
            block_out_channels=(64, 64, 128),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 1, 2),
            cross_attention_dim=64,
            projection_class_embeddings_input_dim=64 + 6 * 256,
        ),
        16,
        4,
    ),
}
# FLOPs of a step at 1024x1024, batch 1, rank 16: without and with every block computed twice
STEP_FLOPS = {0: 14.347e12, 1: 20.478e12, 2: 17.4e12}


@dataclass(frozen=True)
class Setting:
    batch: int
    checkpointing: int = 0
    compiled: bool = False

    def __str__(self) -> str:
        interval = {0: "no checkpointing", 1: "checkpointing every block", 2: "checkpointing every second block"}
        return f"batch {self.batch}, {interval[self.checkpointing]}, {'compiled' if self.compiled else 'eager'}"


def settings() -> list[Setting]:
    return [Setting(b, c, k) for k in (False, True) for b in (1, 4) for c in (0, 1, 2)]


def own(config: SdxlUNetConfig, rank: int, setting: Setting, device: torch.device, dtype: torch.dtype) -> Subject:
    """This project's U-Net and LoRA, prepared in the order of a run."""
    from networks import lora

    with device:
        unet = unet_sdxl.from_config(config).requires_grad_(False).train()
    wrap_model(unet, WrapPolicy(device=device, dtype=dtype), family="sdxl")
    network = lora.create_network(1.0, rank, rank, None, [], unet)
    network.apply_to([], unet, apply_text_encoder=False, apply_unet=True)
    network.to(device)
    policy = WrapPolicy(
        device=device,
        checkpointing_interval=setting.checkpointing,
        compile_backend="inductor" if setting.compiled else None,
    )
    wrap_model(unet, policy, family="sdxl", repeated_block_classes=("BasicTransformerBlock", "ResnetBlock2D"))
    return Subject("this project", unet, list(network.parameters()))


def theirs(config: SdxlUNetConfig, rank: int, setting: Setting, device: torch.device, dtype: torch.dtype) -> Subject:
    """diffusers' U-Net and peft's LoRA; checkpointing there is all or nothing."""
    import peft
    from diffusers import UNet2DConditionModel

    with device:
        unet = UNet2DConditionModel.from_config(config.to_diffusers()).requires_grad_(False).to(dtype).train()
    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=PEFT_TARGETS))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if setting.checkpointing:
        unet.enable_gradient_checkpointing()
    if setting.compiled:
        unet.compile_repeated_blocks()
    return Subject("diffusers + peft", unet, parameters)


def step_of(subject: Subject, config: SdxlUNetConfig, setting: Setting, side: int, device: torch.device) -> Callable:
    """One update: forward under autocast, mean squared error, backward, fused AdamW."""
    optimizer = torch.optim.AdamW(subject.parameters, lr=1e-5, fused=True)
    shape = (setting.batch, config.in_channels, side, side)
    with device:
        latents, target = torch.randn(shape), torch.randn(shape)
        timesteps = torch.arange(setting.batch) * 200 + 37
        text = torch.randn(setting.batch, 77, config.cross_attention_dim)
        vector = torch.randn(setting.batch, config.projection_class_embeddings_input_dim)
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * setting.batch)
    latents, text, vector = (tensor.to(torch.bfloat16) for tensor in (latents, text, vector))  # as the family casts
    pooled = vector[:, : config.pooled_dim]
    is_own = subject.name == "this project"

    def predict() -> torch.Tensor:
        if is_own:
            return subject.unet(latents, timesteps, text, vector)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return subject.unet(latents, timesteps, text, added_cond_kwargs=added).sample

    def step() -> None:
        with autocast(device, torch.bfloat16):
            prediction = predict()
        nn.functional.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_peak(device: torch.device, size: int = 8192, rounds: int = 20) -> float:
    """FLOP/s that a large bf16 matrix product reaches here."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = compare({"product": lambda: a @ b}, rounds=rounds, device=str(device))["product"]
    return 2 * size**3 / seconds


def measure(make: Callable, size: str, setting: Setting, device: torch.device, rounds: int) -> tuple[float, int, int]:
    """Median seconds a step, peak bytes, kernels a step."""
    config, side, rank = SIZES[size]
    empty_cache(device)
    reset_peak_memory(device)
    subject = make(config, rank, setting, device, torch.bfloat16)
    step = step_of(subject, config, setting, side, device)
    seconds = compare({"step": step}, rounds=rounds, device=str(device))["step"]
    kernels = 0 if setting.compiled else count(step).kernels
    return seconds, memory_stats(device).peak or 0, kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--eager", action="store_true", help="leave the compiled settings out")
    args = parser.parse_args()
    device = pick_device(args.device)
    stopwatch(str(device))
    peak = matrix_peak(device) if args.size == "full" else 0.0
    print(
        f"SDXL LoRA step, {args.size} size, bf16, {device}" + (f", matrix peak {peak / 1e12:.0f} TFLOP/s" * (peak > 0))
    )
    for setting in settings():
        if args.eager and setting.compiled:
            continue
        rows = {name: measure(make, args.size, setting, device, args.rounds) for name, make in SUBJECTS.items()}
        print(setting)
        for name, (seconds, memory, kernels) in rows.items():
            words = f"  {name}: {seconds:.3f} s a step, {setting.batch / seconds:.2f} pictures/s"
            words += f", peak {memory / 2**30:.2f} GiB"
            words += f", {kernels} kernels" if kernels else ""
            if peak:
                words += (
                    f", {STEP_FLOPS[setting.checkpointing] * setting.batch / seconds / peak:.0%} of the matrix peak"
                )
            print(words)
        ours, other = (row[0] for row in rows.values())
        print(f"  {other / ours:.2f} times as fast", flush=True)


SUBJECTS = {"this project": own, "diffusers + peft": theirs}

if __name__ == "__main__":
    main()
