"""Several optimizers that a run sees as one: a piece of the parameters each.

Three things need it: optimizers that find their rate, which get one instance for each group so that every part of the
model has a step size of its own; updates inside the backward pass (`fused_backward.py`); and float32 copies of
bfloat16 weights (`stochastic_rounding.py`), which must not exist for the whole model at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.training.stochastic_rounding import marked_float32

if TYPE_CHECKING:
    from library.training.stochastic_rounding import StochasticRounding

Group = dict[str, Any]
Maker = Callable[[list[Group]], torch.optim.Optimizer]


@dataclass(slots=True)
class Piece:
    """Parameters that are updated together.

    Attributes:
        optimizer: of these parameters.
        group: number of the group that the run sees them in, whose rate and other settings count; None = of all.
        whole: the piece is all of that group (or of all groups), so that the dicts are the same.
    """

    optimizer: torch.optim.Optimizer
    group: int | None
    whole: bool = True

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class PiecewiseOptimizer(torch.optim.Optimizer):
    """Pieces behind the face of one optimizer: groups, state, and files of states are those of a plain one.

    Args:
        make: makes a plain optimizer of groups.
        groups: what the run sees.
        splits: for each group the pieces of it, in order, as lists of its parameters; None = one piece for all groups.
        rounding: how bfloat16 weights are updated; None updates them as they are.

    Attributes:
        pieces: in the order of the parameters.
        found_inf: set by the run's guard: 1 masks the update, where the optimizer can.
    """

    def __init__(
        self,
        make: Maker,
        groups: Sequence[Group],
        splits: Sequence[Sequence[Sequence[nn.Parameter]]] | None,
        *,
        rounding: StochasticRounding | None = None,
    ) -> None:
        if splits is None:
            plain = make(list(groups))
            self.pieces, shown = [Piece(plain, None)], plain.param_groups
        else:
            self.pieces, shown = _pieces(make, groups, splits)
        super().__init__(shown, dict(self.pieces[0].optimizer.defaults))
        self.rounding = rounding
        self._link()

    def _link(self) -> None:
        """One state for all, and one dict for a group and the piece that is all of it."""
        for piece in self.pieces:
            piece.optimizer.state = self.state
            if piece.group is None:
                piece.optimizer.param_groups = self.param_groups
            elif piece.whole:
                piece.optimizer.param_groups = [self.param_groups[piece.group]]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """One of the plain optimizers, to ask for its class and for how it computes rates."""
        return self.pieces[0].optimizer

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every piece."""
        for number in range(len(self.pieces)):
            self.update(number, getattr(self, "found_inf", None))

    def update(self, number: int, found_inf: torch.Tensor | None = None) -> None:
        """Update one piece; `found_inf` masks it on the device if the optimizer is fused."""
        piece = self.pieces[number]
        if not piece.whole:
            shown = self.param_groups[piece.group or 0]
            piece.optimizer.param_groups[0].update({k: v for k, v in shown.items() if k != "params"})
        if found_inf is not None:
            piece.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        with self._float32(number):
            piece.optimizer.step()

    def _float32(self, number: int) -> contextlib.AbstractContextManager[None]:
        if self.rounding is None:
            return contextlib.nullcontext()
        return self.rounding.float32(self.pieces[number].parameters, number)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`, that of a plain optimizer of the same groups, or of other pieces."""
        parameters = [p for piece in self.pieces for p in piece.parameters]
        with marked_float32(parameters) if self.rounding is not None else contextlib.nullcontext():
            super().load_state_dict(state_dict)
        self._link()


def _pieces(
    make: Maker, groups: Sequence[Group], splits: Sequence[Sequence[Sequence[nn.Parameter]]]
) -> tuple[list[Piece], list[Group]]:
    """The pieces, and the groups as the run sees them."""
    pieces: list[Piece] = []
    shown: list[Group] = []
    for number, (group, parts) in enumerate(zip(groups, splits, strict=True)):
        whole = len(parts) == 1
        made = [make([{**group, "params": list(part)}]) for part in parts]
        pieces += [Piece(optimizer, number, whole) for optimizer in made]
        first = made[0].param_groups[0]
        shown.append(first if whole else {**first, "params": list(group["params"])})
    return pieces, shown


def instances(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The plain optimizers behind one that may be made of pieces."""
    if isinstance(optimizer, PiecewiseOptimizer):
        return [piece.optimizer for piece in optimizer.pieces]
    return [optimizer]


def masks_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `found_inf` leaves weights and moments alone, without asking the host: torch's fused optimizers.

    The first update of SGD makes its momentum, which a mask would leave undefined.
    """
    return all(
        group.get("fused") and (not group.get("momentum") or all(p in optimizer.state for p in group["params"]))
        for group in optimizer.param_groups
    )


def runs_of(parameters: Sequence[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in runs of at most `limit` elements (one larger parameter is a run of its own), in order."""
    run: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if run and size + parameter.numel() > limit:
            yield run
            run, size = [], 0
        run.append(parameter)
        size += parameter.numel()
    if run:
        yield run


def equal_runs(groups: Sequence[Group], count: int) -> tuple[list[int], list[Group]]:
    """Groups cut in order into runs of ceil(tensors / count) parameters; a run lies in one group.

    Returns:
        For each run the number of its group; the runs as groups.
    """
    total = sum(len(group["params"]) for group in groups)
    length = max(1, -(-total // count))
    sources, runs = [], []
    for number, group in enumerate(groups):
        parameters = group["params"]
        for start in range(0, len(parameters), length):
            sources.append(number)
            runs.append({**group, "params": parameters[start : start + length]})
    return sources, runs
