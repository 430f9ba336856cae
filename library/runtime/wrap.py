"""What happens to a model between loading and the first step, in the one order that works."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from library.messages import warn_once
from library.runtime.attention import set_kernel_order

# Convolutions are 55 % of the SD 1.x/2.x U-Net's work but 24 % of SDXL's, and small maps gain nothing.
CHANNELS_LAST = {
    ("sd", "cuda"): True,
    ("sd", "xpu"): True,
    ("sd", "cpu"): True,
    ("sdxl", "cuda"): True,
    ("sdxl", "xpu"): True,
}
STATIC_SHAPES = 4
COMPILED_VARIANTS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class WrapPolicy:
    """How a U-Net is prepared.

    Attributes:
        device: where it computes.
        dtype: of frozen weights, None to keep them.
        channels_last: memory layout of convolutions; None = as the table of family and device says.
        checkpointing_interval: recompute every n-th segment in the backward pass; 0 keeps all activations.
        offload_checkpoints: what checkpointing keeps waits in CPU memory.
        compile_backend: torch.compile's backend for the repeated blocks, None to leave them as they are.
        shapes: how many input shapes will come (buckets x batch sizes): few are compiled one by one.
    """

    device: torch.device | str
    dtype: torch.dtype | None = None
    channels_last: bool | None = None
    checkpointing_interval: int = 0
    offload_checkpoints: bool = False
    compile_backend: str | None = None
    shapes: int = 1


def wrap_model(
    model: nn.Module,
    policy: WrapPolicy,
    *,
    family: str = "sd",
    repeated_block_classes: tuple[str, ...] = (),
) -> nn.Module:
    """Prepare a loaded model: cast and layout, checkpointing, compile of the repeated blocks.

    Args:
        model: a U-Net; changed in place.
        policy: what to do.
        family: `sd` or `sdxl`, for the layout.
        repeated_block_classes: class names of the blocks to compile (`Family.repeated_block_classes`).

    Returns:
        The same model.
    """
    set_kernel_order()
    device = torch.device(policy.device)
    model.to(device=device, dtype=policy.dtype)
    last = CHANNELS_LAST.get((family, device.type), False) if policy.channels_last is None else policy.channels_last
    if last:
        model.to(memory_format=torch.channels_last)
    if policy.checkpointing_interval:
        _enable_checkpointing(model, policy.checkpointing_interval, policy.offload_checkpoints)
    if policy.compile_backend is not None:
        compile_blocks(model, repeated_block_classes, policy.compile_backend, dynamic=policy.shapes > STATIC_SHAPES)
    return model


def _enable_checkpointing(model: nn.Module, interval: int, offload: bool) -> None:
    if offload:
        model.enable_gradient_checkpointing(interval, cpu_offload=True)
    elif interval == 1:
        # Without an argument, so that models of third parties are asked as they expect.
        model.enable_gradient_checkpointing()
    else:
        model.enable_gradient_checkpointing(interval)


def compile_blocks(model: nn.Module, class_names: tuple[str, ...], backend: str, *, dynamic: bool) -> int:
    """Compile every block of these classes in place; a failure leaves the block as it was, with one warning.

    Returns:
        The number of blocks that were handed to the compiler (it runs at their first call).
    """
    blocks = [module for module in model.modules() if type(module).__name__ in class_names]
    try:
        import torch._dynamo.config as settings

        settings.suppress_errors = True
        # Blocks of one class share their code, and each width and bucket is a variant of it.
        for name in ("recompile_limit", "cache_size_limit"):
            if hasattr(settings, name):
                setattr(settings, name, max(getattr(settings, name), COMPILED_VARIANTS))
        for block in blocks:
            block.compile(backend=backend, dynamic=dynamic)
    except Exception as error:
        warn_once(f"torch.compile is not possible here and is left out ({type(error).__name__}: {error})")
        return 0
    return len(blocks)
