"""Modules built from the weights that golden files of the network tools hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Class names by which networks find layers: last part of a path that is a module of that class.
_CLASSES = {
    "attentions.0": "Transformer2DModel",
    "resnets.0": "ResnetBlock2D",
    "self_attn": "CLIPAttention",
    "mlp": "CLIPMLP",
}


def module_of(weights: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """A module with a Linear or Conv2d for every `weight` under the prefix, in the order of the keys."""
    root = nn.Module()
    for key, weight in weights.items():
        if key.startswith(prefix) and key.endswith(".weight") and weight.dim() in (2, 4) and "embedding" not in key:
            path = key[len(prefix) : -len(".weight")]
            parent = root
            parts = path.split(".")
            for i in range(len(parts) - 1):
                if not hasattr(parent, parts[i]):
                    tail = ".".join(parts[: i + 1])
                    name = next((c for end, c in _CLASSES.items() if tail.endswith(end)), "Module")
                    parent.add_module(parts[i], type(name, (nn.Module,), {})())
                parent = getattr(parent, parts[i])
            parent.add_module(parts[-1], _layer(weight))
    return root.requires_grad_(False)


def _layer(weight: Tensor) -> Any:
    if weight.dim() == 2:
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)
    layer.weight.data.copy_(weight)
    return layer
