"""What a training step costs in arithmetic, for the share of the device's peak in the report.

Counted are the matrix products, convolutions and attentions of the first micro-step, forward and backward; they are
all but a few percent of the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):
    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class WorkCounter:
    """Counts the first micro-step.

    Args:
        wanted: somebody needs the number (the device's peak is known).

    Attributes:
        per_picture: floating-point operations of one picture, None before the first micro-step or unwanted.
    """

    def __init__(self, wanted: bool = False) -> None:
        self.wanted = wanted
        self.per_picture: float | None = None

    @contextlib.contextmanager
    def counted(self, pictures: int) -> Iterator[None]:
        """Forward and backward of a micro-step with so many pictures happen inside."""
        if not self.wanted or not pictures:
            yield
            return
        self.wanted = False
        with _without_compiling(), _Counter() as counter:
            yield
        self.per_picture = counter.flops / pictures


def _without_compiling() -> contextlib.AbstractContextManager:
    """Compiled blocks would be hidden from the count; torch older than 2.6 cannot step aside."""
    stance = getattr(torch.compiler, "set_stance", None)
    return contextlib.nullcontext() if stance is None else stance("force_eager")
