"""Optimizer groups of an adapter network: one per part of the model, LoRA+ parameters in a group of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Part:
    """Adapters that share a learning rate.

    Attributes:
        description: name of the rate in the logs.
        adapters: the modules.
        lr: None leaves the rate to the optimizer's default; 0 leaves the part out.
        plus_ratio: factor of the rate for the method's "plus" parameters (LoRA+), or None.
        default_lr: what `plus_ratio` multiplies when `lr` is None.
    """

    description: str
    adapters: Sequence[nn.Module]
    lr: float | None
    plus_ratio: float | None = None
    default_lr: float | None = None


def build(parts: Sequence[Part], plus_parameters: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups as torch optimizers take them, and one description per group.

    Args:
        plus_parameters: text in the names of the parameters that LoRA+ speeds up.
    """
    groups: list[dict[str, Any]] = []
    descriptions: list[str] = []
    for part in parts:
        plain, plus = _split(part, plus_parameters)
        for parameters, factor, word in ((plain, None, ""), (plus, part.plus_ratio, " plus")):
            lr = part.lr if factor is None else _times(part.lr if part.lr is not None else part.default_lr, factor)
            if not parameters or lr == 0:
                continue
            groups.append({"params": parameters} if lr is None else {"params": parameters, "lr": lr})
            descriptions.append(part.description + word)
    return groups, descriptions


def _split(part: Part, plus_parameters: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    plain: list[nn.Parameter] = []
    plus: list[nn.Parameter] = []
    for adapter in part.adapters:
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                (plus if part.plus_ratio and plus_parameters in name else plain).append(parameter)
    return plain, plus


def _times(lr: float | None, factor: float) -> float | None:
    return None if lr is None else lr * factor
