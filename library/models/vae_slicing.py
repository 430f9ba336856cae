"""A VAE whose convolutions work on horizontal slices of a picture: the same numbers with less memory at once."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn


def slice_convolutions(vae: nn.Module, slices: int) -> None:
    """Make every convolution of a VAE compute `slices` horizontal slices one after the other, in place.

    Group norms and attention see the whole picture, so that results equal those of the plain VAE up to rounding.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.forward = functools.partial(sliced_convolution, module, slices=slices)  # type: ignore[method-assign]


def sliced_convolution(conv: nn.Conv2d, x: torch.Tensor, *, slices: int) -> torch.Tensor:
    """A convolution of (B, C, H, W) in slices of rows, each with the rows around it that its kernel reaches."""
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], _row_padding(conv)
    rows = (x.shape[2] + 2 * padding - kernel) // stride + 1
    count = min(slices, rows)
    edges = [rows * i // count for i in range(count + 1)]
    parts = []
    for start, end in itertools.pairwise(edges):
        first, last = start * stride - padding, (end - 1) * stride + kernel - padding
        part = x[:, :, max(0, first) : min(x.shape[2], last)]
        part = F.pad(part, (0, 0, max(0, -first), max(0, last - x.shape[2])))
        parts.append(F.conv2d(part, conv.weight, conv.bias, conv.stride, (0, conv.padding[1])))
    return torch.cat(parts, dim=2)


def _row_padding(conv: nn.Conv2d) -> int:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or conv.dilation != (1, 1) or conv.groups != 1:
        raise ValueError(f"a convolution that cannot be sliced: {conv}")
    return conv.padding[0]
