"""Frozen parts of a model that compute in half precision are written as they were read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


class KeptWeights:
    """What a cast takes away from modules that do not learn, on the CPU, until a file is written."""

    def __init__(self) -> None:
        self.modules: list[tuple[nn.Module, Tensors]] = []

    def keep(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Remember the tensors that `dtype` cannot hold exactly; called before the cast."""
        lost = {name: t for name, t in module.state_dict().items() if t.is_floating_point() and not fits(t, dtype)}
        if lost:
            self.modules.append((module, {name: compact(tensor) for name, tensor in lost.items()}))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The modules have their own weights inside the block, in float32 on the CPU; afterwards they are as before."""
        places = []
        for module, kept in self.modules:
            first = next(module.parameters())
            places.append((first.device, first.dtype))
            nn.Module.to(module, "cpu", torch.float32)
            own = module.state_dict()
            for name, tensor in kept.items():
                own[name].copy_(tensor)
        try:
            yield
        finally:
            for (module, _), place in zip(self.modules, places, strict=True):
                nn.Module.to(module, *place)


def fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds every value exactly."""
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, in float16 where that loses nothing (most published files are)."""
    dtype = torch.float16 if fits(tensor, torch.float16) else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)
