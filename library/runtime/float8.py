"""Frozen weights held in 8-bit floats (`--fp8_base`): half the memory of bfloat16, cast wherever they are used.

Only the storage is small: products run in the format of their input, and the casted weight lives for one product,
forward or backward. Norms, biases, embeddings and the first and last layer keep their format; they are small.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from library.runtime.precision import autocast_dtype

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # beyond it the format has no infinity, only NaN


def hold_in_float8(module: nn.Module) -> int:
    """Hold the weights of a frozen module's linear layers and convolutions in float8 (e4m3), in place.

    Call it after the module has its device and format, and before adapters take its layers over.

    Returns:
        The number of layers that are held so.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    held = 0
    for layer in layers[1:-1]:
        if layer.weight.requires_grad or not _is_plain(layer):
            continue
        layer.weight.data = layer.weight.data.clamp(-LARGEST, LARGEST).to(FLOAT8)
        layer.forward = MethodType(_linear if isinstance(layer, nn.Linear) else _convolution, layer)
        held += 1
    return held


def _is_plain(layer: nn.Linear | nn.Conv2d) -> bool:
    """Zero padding in numbers only: torch's function for the gradient knows no other."""
    return isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _Product.apply(_compute(x), layer.weight, layer.bias, None)


def _convolution(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    form = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _Product.apply(_compute(x), layer.weight, layer.bias, form)


def _compute(x: torch.Tensor) -> torch.Tensor:
    """The input in autocast's format, where that is on."""
    return x.to(autocast_dtype(x) or x.dtype)


class _Product(torch.autograd.Function):
    """`layer(x)` that keeps the 8-bit weight for the backward pass, where autograd would keep the casted one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, form: Any) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.form, ctx.shape = form, x.shape
        bias = None if bias is None else bias.to(x.dtype)
        if form is None:
            return F.linear(x, weight.to(x.dtype), bias)
        return F.conv2d(x, weight.to(x.dtype), bias, *form)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)
        if ctx.form is None:
            return gradient @ weight, None, None, None
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.form), None, None, None
