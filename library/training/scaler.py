"""The gradient scaler of fp16 training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from library.options.precision import PrecisionConfig


class HalfGradientScaler(torch.amp.GradScaler):
    """A scaler that unscales float16 gradients too, which `--full_fp16` makes (torch refuses them)."""

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def make_scaler(precision: PrecisionConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """A scaler under `--mixed_precision fp16`, else None; bfloat16 needs none."""
    if precision.mixed_precision != "fp16":
        return None
    return (HalfGradientScaler if precision.full_fp16 else torch.amp.GradScaler)(device.type)
