"""What every U-Net can be told from outside: which attention, which activations to keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library.models.layers import CrossAttention, set_attention_backend


class UNetSwitches(nn.Module):
    """Attention backend and checkpointing of a U-Net, under the names that scripts and third parties call.

    A subclass says with `checkpoint_segments` which parts checkpointing recomputes.
    """

    _checkpointing_interval = 0

    def checkpoint_segments(self) -> list[nn.Module]:
        """The parts that checkpointing recomputes, in the order in which they run."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.parameters()).device

    def set_attention_backend(self, backend: str) -> None:
        """Set the backend of every attention layer (`library.runtime.attention.BACKENDS`)."""
        set_attention_backend(self, backend)

    def set_use_memory_efficient_attention(self, xformers: bool, mem_eff: bool) -> None:
        """Old switch: `xformers` picks that backend, anything else torch's own kernels."""
        CrossAttention.set_use_memory_efficient_attention(self, xformers, mem_eff)

    def set_use_sdpa(self, sdpa: bool) -> None:
        """Old switch: torch's own kernels, or the plain reference when switched off."""
        CrossAttention.set_use_sdpa(self, sdpa)

    def set_attention_slice(self, slice_size: Any) -> None:
        raise NotImplementedError("attention is not sliced; torch's kernels do not need it")

    def enable_gradient_checkpointing(self, interval: int = 1, *, cpu_offload: bool = False) -> None:
        """Recompute every `interval`-th segment in the backward pass (training mode only).

        Args:
            cpu_offload: the segments' inputs wait in CPU memory.
        """
        if interval < 1:
            raise ValueError("the interval must be at least 1")
        self._set_checkpointing(interval)
        for segment in self.checkpoint_segments():
            segment.offloaded = cpu_offload

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations."""
        self._set_checkpointing(0)

    def set_gradient_checkpointing(self, value: bool = False) -> None:
        """Old switch: recompute every segment, or none."""
        self._set_checkpointing(1 if value else 0)

    def is_gradient_checkpointing(self) -> bool:
        """Whether any segment is recomputed."""
        return self._checkpointing_interval > 0

    def _set_checkpointing(self, interval: int) -> None:
        self._checkpointing_interval = interval
        for index, segment in enumerate(self.checkpoint_segments()):
            segment.checkpointed = interval > 0 and index % interval == 0

    def prepare_config(self, *args: Any, **kwargs: Any) -> None:
        """Kept for old callers: `config` is complete from the start."""
