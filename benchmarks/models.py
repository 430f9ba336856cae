"""The pairs that the benchmarks compare: this project's U-Net and LoRA, diffusers' U-Net and peft's LoRA."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.models import unet_sd
from library.models.unet_config import UNetConfig
from library.runtime.wrap import WrapPolicy, wrap_model

SMALL = UNetConfig(sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=768)
SD15 = UNetConfig(cross_attention_dim=768)
# networks.lora adapts every Linear and 1x1 convolution inside Transformer2DModel by default.
PEFT_TARGETS = (
    r".*attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn\d\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.0\.proj|ff\.net\.2))"
)


@dataclass
class Subject:
    """A U-Net with what is trained of it."""

    name: str
    unet: nn.Module
    parameters: list[nn.Parameter]
    modules: int = 0


def own_unet(config: UNetConfig, device: str) -> nn.Module:
    """This project's U-Net, prepared as a run prepares it."""
    with torch.device("meta" if device == "meta" else "cpu"):
        unet = unet_sd.from_config(config)
    policy = WrapPolicy(device=device, channels_last=True if device == "meta" else None)
    return wrap_model(unet.requires_grad_(False), policy).train()


def add_own_lora(unet: nn.Module, rank: int, device: str) -> Subject:
    """Attach `networks.lora` with its default targets."""
    from networks import lora

    with torch.device("meta" if device == "meta" else "cpu"):
        network = lora.create_network(1.0, rank, rank, None, [], unet)
    network.apply_to([], unet, apply_text_encoder=False, apply_unet=True)
    network.to(device)
    return Subject("networks.lora", unet, list(network.parameters()), len(network.unet_loras))


def diffusers_unet(config: UNetConfig, device: str) -> nn.Module:
    """diffusers' U-Net of the same dimensions."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta" if device == "meta" else "cpu"):
        unet = UNet2DConditionModel.from_config(config.to_diffusers())
    return unet.requires_grad_(False).to(device).train()


def add_peft_lora(unet: Any, rank: int) -> Subject:
    """Attach peft's LoRA of the same rank to the same modules."""
    import peft

    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=PEFT_TARGETS))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    return Subject("diffusers + peft", unet, parameters, len(parameters) // 2)


def lora_pair(config: UNetConfig, rank: int, device: str) -> tuple[Subject, Subject]:
    """(this project's, diffusers + peft's), the same base weights."""
    theirs = diffusers_unet(config, device)
    ours = own_unet(config, device)
    if device != "meta":
        ours.load_state_dict(theirs.state_dict())
    return add_own_lora(ours, rank, device), add_peft_lora(theirs, rank)


def full_pair(config: UNetConfig, device: str) -> tuple[Subject, Subject]:
    """(this project's, diffusers') with every weight of the U-Net trained."""
    theirs = diffusers_unet(config, device).requires_grad_(True)
    ours = own_unet(config, device).requires_grad_(True)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return (
        Subject("this project", ours, list(ours.parameters())),
        Subject("diffusers", theirs, list(theirs.parameters())),
    )


def batch_for(config: UNetConfig, batch: int, side: int, device: str) -> tuple[torch.Tensor, ...]:
    """Random (latents, timesteps, text, target)."""
    shape = (batch, config.in_channels, side, side)
    latents, target = torch.randn(shape, device=device), torch.randn(shape, device=device)
    text = torch.randn(batch, 77, config.cross_attention_dim, device=device)
    return latents, torch.arange(batch, device=device) * 400 + 37, text, target


def forward(subject: Subject, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    latents, timesteps, text, _ = batch
    return subject.unet(latents, timesteps, text).sample


def backward(subject: Subject, batch: tuple[torch.Tensor, ...]) -> None:
    """Forward, mean squared error and backward."""
    nn.functional.mse_loss(forward(subject, batch), batch[3]).backward()


def stopwatch(device: str) -> Callable[[], float]:
    """Seconds of this process' CPU time, or of the wall once the device has finished its queue."""
    if device == "cpu":
        return time.process_time
    from library.runtime.devices import synchronize

    def wall() -> float:
        synchronize(device)
        return time.perf_counter()

    return wall


def compare(works: dict[str, Callable[[], Any]], *, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each piece of work, in turns so that a busy machine disturbs all alike; one warm-up round."""
    clock = stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            work()
            if round_number:
                times[name].append(clock() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}
