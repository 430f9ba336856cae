"""Updates inside the backward pass: a gradient lives only until its parameter has been updated, which saves memory.

`--fused_backward_pass` updates each parameter by itself, `--fused_optimizer_groups K` updates K runs of parameters,
each when all its gradients are there. There is no common gradient norm then: each parameter is clipped alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.messages import UserError
from library.training.pieces import Group, Maker, PiecewiseOptimizer, masks_on_device

if TYPE_CHECKING:
    from library.runtime.processes import Processes
    from library.training.stochastic_rounding import StochasticRounding

_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class FusedBackward(PiecewiseOptimizer):
    """Pieces that are updated as soon as their gradients are complete; `step` itself has nothing left to do.

    A non-finite gradient masks the update of its piece on the device, weights and moments alike.

    Args:
        make, groups, splits, rounding: see `PiecewiseOptimizer`.
        max_grad_norm: largest norm of one parameter's gradient, 0 for no limit.

    Attributes:
        last_norm: of all gradients of the last backward pass together, before clipping; on the device.
    """

    def __init__(
        self,
        make: Maker,
        groups: Sequence[Group],
        splits: Sequence[Sequence[Sequence[nn.Parameter]]],
        *,
        max_grad_norm: float,
        rounding: StochasticRounding | None = None,
    ) -> None:
        super().__init__(make, groups, splits, rounding=rounding)
        self.max_grad_norm = max_grad_norm
        self._missing = [len(piece.parameters) for piece in self.pieces]
        self._bad: list[torch.Tensor | None] = [None] * len(self.pieces)
        self._norms: list[torch.Tensor] = []
        self.last_norm: torch.Tensor | None = None
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))
            for number, piece in enumerate(self.pieces)
            for parameter in piece.parameters
        ]

    def _arrived(self, number: int, parameter: nn.Parameter) -> None:
        """A gradient is complete: clip it, and update its piece if it was the last one."""
        gradient = parameter.grad
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
        if self.max_grad_norm:
            gradient.mul_((self.max_grad_norm / (norm + _EPSILON)).clamp(max=1.0).to(gradient.dtype))
        self._norms.append(norm)
        bad, before = (~torch.isfinite(norm)).float(), self._bad[number]
        self._bad[number] = bad if before is None else torch.maximum(before, bad)
        self._missing[number] -= 1
        if not self._missing[number]:
            self._update_now(number)

    @torch.no_grad()
    def _update_now(self, number: int) -> None:
        parameters = self.pieces[number].parameters
        flag = self._bad[number]
        assert flag is not None
        if masks_on_device(self.pieces[number].optimizer):
            self.update(number, flag)
        else:
            kept = [(p, p.detach().clone(), self._moments(p)) for p in parameters if p.grad is not None]
            self.update(number)
            for parameter, values, moments in kept:
                parameter.copy_(torch.where(flag > 0, values, parameter))
                self._keep_moments(parameter, moments, flag)
        for parameter in parameters:
            parameter.grad = None
        self._missing[number] = len(parameters)

    def _moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.state.get(parameter, {})
        return {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}

    def _keep_moments(self, parameter: nn.Parameter, before: dict[str, torch.Tensor], flag: torch.Tensor) -> None:
        state = self.state[parameter]
        for key, value in state.items():
            if torch.is_tensor(value):
                earlier = before.get(key)
                state[key] = torch.where(flag > 0, torch.zeros_like(value) if earlier is None else earlier, value)

    def finish_backward(self) -> torch.Tensor:
        """The backward pass is over: update pieces of which some parameters got no gradient.

        Returns:
            Not 0 if a gradient was not finite; float32 (1,) on the device of the parameters.
        """
        for number, piece in enumerate(self.pieces):
            if self._missing[number] < len(piece.parameters):
                self._update_now(number)
        if self._norms:
            self.last_norm = torch.linalg.vector_norm(torch.stack(self._norms))
            self._norms = []
        flags = [flag for flag in self._bad if flag is not None]
        self._bad = [None] * len(self.pieces)
        return torch.stack(flags).max().reshape(1) if flags else torch.zeros(1)

    def take_back_counts(self) -> None:
        """The last backward pass was masked: counters of updates that live in Python go back too."""
        for parameter, state in list(self.state.items()):
            if not isinstance(state.get("step"), int):
                continue
            state["step"] -= 1
            if state["step"] < 1:
                del self.state[parameter]  # as before the first update

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Everything is updated already."""


def require_one_process(optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Gradients are averaged over processes when all are there, which is never the case here.

    Raises:
        UserError: there are several processes.
    """
    if isinstance(optimizer, FusedBackward) and processes.count > 1:
        raise UserError(
            f"updates inside the backward pass on {processes.count} processes",
            "leave out --fused_backward_pass and --fused_optimizer_groups, or launch one process",
        )
