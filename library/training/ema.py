"""An exponential moving average of whatever a run trains, saved and sampled beside the weights themselves.

The average is float32, because steps of 0.1 % vanish in bfloat16. An update is taken into it when the next one is
about to be made (or when the average is wanted): by then the loop knows that the update was finite, and the
weight-norm cap that follows an update has been applied. Where the backward pass itself makes the updates, it is taken
in at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from library.messages import UserError
from library.training.fused_backward import FusedBackward

if TYPE_CHECKING:
    from library.options.ema import EmaConfig

FILE_MARK = "-ema"


class MovingAverage:
    """The average of some parameters over the updates of a run.

    Without parameters it is the average of a run that keeps none.

    Early on its decay is smaller, (1 + n) / (10 + n) after n updates, so that it forgets the first weights.

    Args:
        parameters: what is averaged, in an order that is the same in every run of these options.
        decay: in [0, 1), of the running average.
        start: updates after which the average begins.
        device: where it is kept; None = beside each parameter.
        at_once: take each update in as soon as it is noted.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        decay: float,
        start: int = 0,
        device: torch.device | str | None = None,
        at_once: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.start = start
        self.at_once = at_once
        self.device = None if device is None else torch.device(device)
        self.averages = [self._copy(p, torch.float32) for p in self.parameters]
        self.updates = 0
        self._pending = False

    def _copy(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensor.detach().to(device=self.device or tensor.device, dtype=dtype, copy=True)

    def __bool__(self) -> bool:
        """There is something to average."""
        return bool(self.averages)

    def note_update(self) -> None:
        """An update was made; it counts once `settle` is called."""
        self._pending = bool(self.averages)
        if self.at_once:
            self.settle()

    def forget_update(self) -> None:
        """The update that was noted last turned out not to have been made."""
        self._pending = False

    @torch.no_grad()
    def settle(self) -> None:
        """Take the update that was noted last into the average."""
        if not self._pending:
            return
        self._pending = False
        self.updates += 1
        weights = [p.detach() for p in self.parameters]
        if self.device is not None:
            weights = [w.to(self.device) for w in weights]
        decay = self._decay_now()
        if decay == 0:
            torch._foreach_copy_(self.averages, weights)
        elif all(w.dtype == torch.float32 for w in weights):
            torch._foreach_lerp_(self.averages, weights, 1 - decay)
        else:
            torch._foreach_mul_(self.averages, decay)
            torch._foreach_add_(self.averages, weights, alpha=1 - decay)

    def _decay_now(self) -> float:
        counted = self.updates - self.start
        return 0.0 if counted <= 0 else min(self.decay, (1 + counted) / (10 + counted))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters hold the average inside the block, and exactly what they held before after it."""
        self.settle()
        raw = [self._copy(p, p.dtype) for p in self.parameters]
        weights = [p.data for p in self.parameters]
        torch._foreach_copy_(weights, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, raw)

    def state(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(updates, tensors by number) from which `load_state` goes on exactly."""
        self.settle()
        return self.updates, {f"{index:05d}": average.cpu().contiguous() for index, average in enumerate(self.averages)}

    def load_state(self, updates: int, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from `state()`.

        Raises:
            UserError: it is the average of other weights.
        """
        stored = [tensors[name] for name in sorted(tensors)]
        if [t.shape for t in stored] != [a.shape for a in self.averages]:
            raise UserError(
                "the state holds the moving average of other weights than this run trains",
                "use the options that the state was made with",
            )
        torch._foreach_copy_(self.averages, [t.to(a.device) for t, a in zip(stored, self.averages, strict=True)])
        self.updates, self._pending = updates, False

    def restart(self) -> None:
        """Begin anew from the weights as they are (resumed from a state without an average)."""
        torch._foreach_copy_(self.averages, [p.detach().to(a.device) for p, a in self._pairs()])
        self.updates, self._pending = 0, False

    def _pairs(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        return zip(self.parameters, self.averages, strict=True)


def no_average() -> MovingAverage:
    """Of a run that keeps none."""
    return MovingAverage((), decay=0.0)


def make_average(
    config: EmaConfig, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> MovingAverage:
    """The average that the options ask for; an empty one without `--ema_decay`."""
    if config.ema_decay is None:
        return no_average()
    return MovingAverage(
        [parameter for parameter in parameters if parameter.requires_grad],
        decay=config.ema_decay,
        start=config.ema_start,
        device=config.ema_device,
        at_once=isinstance(optimizer, FusedBackward),
    )


def marked_name(name: str, extension: str) -> str:
    """The name of the averaged weights' file (or folder): `-ema` before the ending."""
    return name.removesuffix(extension) + FILE_MARK + extension if extension else name + FILE_MARK
