"""Parts whose learning rate is 0: they are frozen, whatever the optimizer would make of such a rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.messages import UserError
from library.training.optimizers import parameter_rates


@dataclass(frozen=True, slots=True)
class IdleParts:
    """What is not trained although the target offered it.

    Attributes:
        names: of the groups.
        parameters: all that are in them.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    def freeze(self) -> None:
        """No gradients; called again after hooks that switch them on for everything."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def set_idle_aside(
    groups: Sequence[dict[str, Any]], names: Sequence[str], rate: float | None
) -> tuple[list[dict[str, Any]], list[str], IdleParts]:
    """Take the groups with rate 0 out of those that the optimizer gets, and freeze them.

    Args:
        groups, names: of the target, one name per group.
        rate: of groups that have none of their own.

    Returns:
        The groups that train, their names, and the rest.

    Raises:
        UserError: nothing is left to train.
    """
    rates = parameter_rates(groups, rate)
    idle = IdleParts(
        tuple(name for name, own in zip(names, rates, strict=True) if own == 0),
        tuple(p for group, own in zip(groups, rates, strict=True) if own == 0 for p in group["params"]),
    )
    idle.freeze()
    kept = [group for group, own in zip(groups, rates, strict=True) if own != 0]
    if not kept:
        raise UserError("every learning rate is 0: nothing would be trained", "give --learning_rate above 0")
    return kept, [name for name, own in zip(names, rates, strict=True) if own != 0], idle
