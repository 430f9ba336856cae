"""The pairs that the benchmarks compare: this project's U-Net and LoRA, diffusers' U-Net and peft's LoRA."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.models import unet_sd, unet_sdxl
from library.models.unet_config import SdxlUNetConfig, UNetConfig
from library.runtime.devices import synchronize
from library.runtime.wrap import WrapPolicy, wrap_model

SD15 = UNetConfig(cross_attention_dim=768)
# networks.lora adapts every Linear and 1x1 convolution inside Transformer2DModel by default.
PEFT_TARGETS = (
    r".*attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn\d\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.0\.proj|ff\.net\.2))"
)


@dataclass(frozen=True)
class Shape:
    """Dimensions of a comparison: the U-Net, the side of the latents, the rank of the LoRA."""

    config: UNetConfig
    side: int
    rank: int


# Of each family as it is published, with its proportions in little, and as small as a test wants it.
SHAPES: dict[str, dict[str, Shape]] = {
    "full": {"sd": Shape(SD15, 64, 16), "sdxl": Shape(SdxlUNetConfig(), 128, 16)},
    "small": {
        "sd": Shape(UNetConfig(sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=768), 32, 8),
        "sdxl": Shape(
            SdxlUNetConfig(
                block_out_channels=(64, 128, 256),
                transformer_layers_per_block=(1, 2, 4),
                attention_head_dim=(1, 2, 4),
                cross_attention_dim=512,
                projection_class_embeddings_input_dim=256 + 6 * 256,
            ),
            32,
            8,
        ),
    },
    "tiny": {
        "sd": Shape(
            UNetConfig(block_out_channels=(32, 32, 64, 64), attention_head_dim=2, cross_attention_dim=32), 8, 4
        ),
        "sdxl": Shape(
            SdxlUNetConfig(
                block_out_channels=(32, 32, 64),
                transformer_layers_per_block=(1, 1, 2),
                attention_head_dim=(1, 1, 2),
                cross_attention_dim=32,
                projection_class_embeddings_input_dim=32 + 6 * 256,
            ),
            8,
            4,
        ),
    },
}


@dataclass
class Subject:
    """A U-Net with what is trained of it."""

    name: str
    unet: nn.Module
    parameters: list[nn.Parameter]
    modules: int = 0


@dataclass(frozen=True)
class Batch:
    """Random input of a step, as both caches give it.

    Attributes:
        vector: pooled text and embedded sizes of SDXL, `sizes` the sizes alone; None for other models.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    target: torch.Tensor
    vector: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


def family_of(config: UNetConfig) -> str:
    """`sd` or `sdxl`."""
    return "sdxl" if isinstance(config, SdxlUNetConfig) else "sd"


def own_unet(config: UNetConfig, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """This project's U-Net with random weights, prepared as a run prepares it."""
    with torch.device(device):
        unet = (unet_sdxl if family_of(config) == "sdxl" else unet_sd).from_config(config)
    last = True if device == "meta" and family_of(config) == "sd" else None
    policy = WrapPolicy(device=device, dtype=dtype, channels_last=last)
    return wrap_model(unet.requires_grad_(False), policy, family=family_of(config)).train()


def add_own_lora(unet: nn.Module, rank: int, device: str) -> Subject:
    """Attach `networks.lora` with its default targets."""
    from networks import lora

    with torch.device("meta" if device == "meta" else "cpu"):
        network = lora.create_network(1.0, rank, rank, None, [], unet)
    network.apply_to([], unet, apply_text_encoder=False, apply_unet=True)
    network.to(device)
    return Subject("this project", unet, list(network.parameters()), len(network.unet_loras))


def diffusers_unet(config: UNetConfig, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """diffusers' U-Net of the same dimensions."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel.from_config(config.to_diffusers())
    # torch's own cast: that of diffusers warns of modules to be kept in float32, which these models have none of
    return nn.Module.to(unet.requires_grad_(False), device=device, dtype=dtype).train()


def add_peft_lora(unet: Any, rank: int) -> Subject:
    """Attach peft's LoRA of the same rank to the same modules, its weights in float32."""
    import peft

    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=PEFT_TARGETS))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return Subject("diffusers + peft", unet, parameters, len(parameters) // 2)


def all_trained(name: str, unet: nn.Module) -> Subject:
    """Every weight of a U-Net learns."""
    return Subject(name, unet, list(unet.requires_grad_(True).parameters()))


def lora_pair(shape: Shape, device: str) -> tuple[Subject, Subject]:
    """(this project's, diffusers + peft's) in float32."""
    ours = add_own_lora(own_unet(shape.config, device), shape.rank, device)
    return ours, add_peft_lora(diffusers_unet(shape.config, device), shape.rank)


def full_pair(shape: Shape, device: str) -> tuple[Subject, Subject]:
    """(this project's, diffusers') in float32 with every weight of the U-Net trained."""
    return (
        all_trained("this project", own_unet(shape.config, device)),
        all_trained("diffusers", diffusers_unet(shape.config, device)),
    )


def batch_for(config: UNetConfig, pictures: int, side: int, device: str, dtype: torch.dtype = torch.float32) -> Batch:
    """Random input; the target stays float32, the rest is given in `dtype` as a run casts it."""
    shape = (pictures, config.in_channels, side, side)
    vector = sizes = None
    with torch.device(device):
        latents, target = torch.randn(shape, dtype=dtype), torch.randn(shape)
        timesteps = torch.arange(pictures) * (800 // pictures) + 37
        text = torch.randn(pictures, 77, config.cross_attention_dim, dtype=dtype)
        if isinstance(config, SdxlUNetConfig):
            vector = torch.randn(pictures, config.projection_class_embeddings_input_dim, dtype=dtype)
            sizes = torch.tensor([[side * 8, side * 8, 0, 0, side * 8, side * 8]] * pictures)
    return Batch(latents, timesteps, text, target, vector, sizes)


def forward(subject: Subject, batch: Batch) -> torch.Tensor:
    """The U-Net's prediction."""
    inputs = (batch.latents, batch.timesteps, batch.text)
    if batch.vector is None:
        return subject.unet(*inputs).sample
    if isinstance(subject.unet, unet_sdxl.SdxlUNet2DConditionModel):
        return subject.unet(*inputs, batch.vector)
    added = {"text_embeds": batch.vector[:, : subject.unet.config.projection_class_embeddings_input_dim - 6 * 256]}
    return subject.unet(*inputs, added_cond_kwargs=added | {"time_ids": batch.sizes}).sample


def backward(subject: Subject, batch: Batch) -> None:
    """Forward, mean squared error and backward."""
    nn.functional.mse_loss(forward(subject, batch), batch.target).backward()


def stopwatch(device: str) -> Callable[[], float]:
    """Seconds of this process' CPU time, or of the wall once the device has finished its queue."""
    if device == "cpu":
        return time.process_time

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
