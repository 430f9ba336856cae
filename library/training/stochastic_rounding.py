"""Updates of bfloat16 weights that lose nothing on average (`--full_bf16`).

bfloat16 keeps 8 bits of a number, so an update below 1/256 of a weight is rounded away, always. Here the optimizer
works on float32 copies, which live for the time of the update only, and the result is rounded up or down at random
with the chances that make the mean exact (stochastic rounding, Gupta et al. 2015). It serves every optimizer,
because the optimizer does not know: its parameters are float32 while it looks at them, its moments always.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from library.runtime.streams import stream

_LOW_BITS = 1 << 16


def round_to_bfloat16(values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """float32 values -> bfloat16 of the same shape, rounded up with the chance of what lies above the lower neighbour.

    Values that bfloat16 can hold stay as they are, so that weights without an update do not drift.

    Args:
        values: any shape; overwritten.
        generator: on the device of the values, or on the CPU; None = torch's global one.
    """
    source = generator.device if generator is not None else values.device
    noise = torch.randint(0, _LOW_BITS, values.shape, dtype=torch.int32, device=source, generator=generator)
    bits = values.view(torch.int32)
    bits.add_(noise.to(values.device, non_blocking=True)).bitwise_and_(-_LOW_BITS)
    return values.to(torch.bfloat16)


class StochasticRounding:
    """Lets an optimizer see float32 weights; draws are functions of (seed, update, piece).

    Args:
        seed: of the run. All processes draw the same, so that their weights stay equal.

    Attributes:
        update_number: gives the number of the update; the run sets it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.update_number: Callable[[], int] = lambda: 0

    @contextlib.contextmanager
    def float32(self, parameters: Iterable[nn.Parameter], piece: int = 0) -> Iterator[None]:
        """Parameters with a gradient are float32 inside the block, and bfloat16 in their own memory after it.

        Args:
            piece: which part of the weights this is; each draws its own numbers.
        """
        halves = [p for p in parameters if p.dtype == torch.bfloat16 and p.grad is not None]
        if not halves:
            yield
            return
        stored = [parameter.data for parameter in halves]
        gradients = [parameter.grad for parameter in halves]
        _show(halves, stored, gradients)
        done = False
        try:
            yield
            done = True
        finally:
            updated = torch.cat([p.data.reshape(-1) for p in halves]) if done else None
            for parameter, half, gradient in zip(halves, stored, gradients, strict=True):
                parameter.grad = None  # a gradient must have the weight's format
                parameter.data = half
                parameter.grad = gradient
            if updated is not None:
                _write(stored, round_to_bfloat16(updated, self._generator(updated.device, piece)))

    def _generator(self, device: torch.device, piece: int) -> torch.Generator:
        # MPS generators differ between releases; the CPU's are stable
        where = "cpu" if device.type == "mps" else str(device)
        return stream(self.seed, "rounding", self.update_number(), piece, where)


@contextlib.contextmanager
def marked_float32(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """bfloat16 parameters say float32 inside the block and hold nothing.

    torch casts a loaded optimizer state to the format of the parameters; the moments here are float32.
    """
    halves = [p for p in parameters if p.dtype == torch.bfloat16]
    stored = [parameter.data for parameter in halves]
    for parameter in halves:
        parameter.data = torch.empty(0, dtype=torch.float32, device=parameter.device)
    try:
        yield
    finally:
        for parameter, half in zip(halves, stored, strict=True):
            parameter.data = half


def _show(
    halves: Sequence[nn.Parameter], stored: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> None:
    """Give the parameters float32 views of two flat buffers: a few kernels, however many parameters there are."""
    weights = _views(torch.cat([half.reshape(-1) for half in stored]).float(), stored)
    slopes = _views(torch.cat([g.reshape(-1) for g in gradients if g is not None]).float(), stored)
    for parameter, weight, slope in zip(halves, weights, slopes, strict=True):
        parameter.grad = None
        parameter.data = weight
        parameter.grad = slope


def _write(stored: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    torch._foreach_copy_(list(stored), _views(flat, stored))


def _views(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
