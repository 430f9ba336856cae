"""The cap on the norm of each module's update (`--scale_weight_norms`), on the device and in few kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def cap(adapters: Iterable[Any], limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scale `lora_down` and `lora_up` in place so that no update's Frobenius norm exceeds the limit.

    Modules of equal shape are computed together. The norm of U D needs no product of the layer's size:
    |U D|^2 = sum(U^T U * D D^T).

    Returns:
        0-dim tensors: modules scaled, mean norm, largest norm (of the update at multiplier 1, after scaling).
    """
    by_shape: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for adapter in adapters:
        by_shape[(adapter.lora_down.weight.shape, adapter.lora_up.weight.shape)].append(adapter)

    counts, norms = [], []
    for group in by_shape.values():
        downs = [adapter.lora_down.weight for adapter in group]
        ups = [adapter.lora_up.weight for adapter in group]
        down, up = torch.stack(downs), torch.stack(ups)
        # The scale from its buffer, not from the Python number: nothing crosses between host and device.
        scale = torch.stack([adapter.alpha for adapter in group]).float() / group[0].lora_dim
        norm = _norms(down.flatten(2).float(), up.flatten(2).float()) * scale
        bounded = norm.clamp(min=limit / 2)
        ratio = bounded.clamp(max=limit) / bounded
        root = ratio.sqrt()
        torch._foreach_copy_(downs, list((down * root.view(-1, *[1] * (down.dim() - 1))).unbind()))
        torch._foreach_copy_(ups, list((up * root.view(-1, *[1] * (up.dim() - 1))).unbind()))
        counts.append((ratio != 1).sum())
        norms.append(norm * ratio)
    all_norms = torch.cat(norms)
    return torch.stack(counts).sum(), all_norms.mean(), all_norms.max()


def _norms(down: Tensor, up: Tensor) -> Tensor:
    """Frobenius norms of `up down`: (n, r, in), (n, out, r) -> (n,)."""
    squares = (torch.bmm(up.mT, up) * torch.bmm(down, down.mT)).sum((1, 2))
    return squares.clamp(min=0).sqrt()
