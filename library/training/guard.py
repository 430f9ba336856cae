"""Keeps non-finite losses and gradients out of the weights, without a host read in the step.

The flag is computed on the device and masks the update there (fused optimizers take it as `found_inf`); it is
copied to pinned memory and read one update later. Optimizers that cannot be masked, and those that update inside the
backward pass, are asked at once. Then the run stops, or goes on without that update (`--nan_policy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.messages import log
from library.training.fused_backward import FusedBackward
from library.training.pieces import masks_on_device

if TYPE_CHECKING:
    from library.runtime.processes import Processes

# With `--nan_policy skip`, so many updates left out in a row are no accident.
MOST_IN_A_ROW = 20


@dataclass(slots=True)
class Suspect:
    """One update under watch: what to say, and where to go back to, should its flag be up."""

    flag: torch.Tensor
    ready: torch.cuda.Event | None
    image_keys: list[str]
    timesteps: torch.Tensor | None
    place_to_return: Any

    def is_bad(self) -> bool:
        if self.ready is not None:
            self.ready.synchronize()
        # numpy reads host memory directly; `.item()` would be counted, and is, as a host read
        return bool(self.flag.numpy().any())

    def describe(self) -> str:
        steps = "" if self.timesteps is None else f", timesteps {self.timesteps.tolist()}"
        return f"pictures {', '.join(self.image_keys) or '(unnamed)'}{steps}"


class FiniteGuard:
    """Watches updates; `check_last()` tells of the previous one, `watch()` masks and remembers this one.

    Args:
        optimizer: of the run.
        policy: `--nan_policy`.
        processes: that train together, and leave an update out together.
        masks: the optimizer may be asked to mask an update, where it can.

    Attributes:
        skipped: updates left out so far; in_a_row: those since the last good one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        policy: str = "stop",
        processes: Processes | None = None,
        *,
        masks: bool = True,
    ) -> None:
        self.optimizer = optimizer
        self.policy = policy
        self.processes = processes
        self.masks = masks
        self.last: Suspect | None = None
        self.skipped = self.in_a_row = 0

    def watch(
        self,
        losses: list[torch.Tensor],
        gradient_norm: torch.Tensor | None,
        *,
        image_keys: list[str],
        timesteps: torch.Tensor | None,
        place_to_return: Any,
    ) -> bool:
        """Look at this update's losses and gradient norm.

        Returns:
            False if the update must not be made (only told for optimizers that cannot be masked).
        """
        values = [loss.detach().float().reshape(()) for loss in losses]
        if gradient_norm is not None:
            values.append(gradient_norm.detach().float().reshape(()))
        bad = (~torch.isfinite(torch.stack(values))).any().float().reshape(1)
        in_backward = isinstance(self.optimizer, FusedBackward)
        if in_backward:
            bad = torch.maximum(bad, self.optimizer.finish_backward().to(bad.device))
        if self.processes is not None and self.processes.count > 1:
            bad = (self.processes.reduce_mean(bad) > 0).float()
        flag, ready = bad, None
        if bad.is_cuda:
            flag = torch.empty(1, pin_memory=True)
            flag.copy_(bad, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        elif bad.device.type != "cpu":
            flag = bad.cpu()
        self.last = Suspect(flag, ready, image_keys, timesteps, place_to_return)
        if self.masks and not in_backward and masks_on_device(self.optimizer):
            self.optimizer.found_inf = bad.reshape(())  # type: ignore[attr-defined]
            return True
        if not self.last.is_bad():
            return True
        if in_backward:
            self.optimizer.take_back_counts()
        return False

    def check_last(self) -> Suspect | None:
        """The previous update if it was not finite; asked before the next update and at the end."""
        last, self.last = self.last, None
        if last is None:
            return None
        if last.is_bad():
            return last
        self.in_a_row = 0
        return None

    def tolerates(self, suspect: Suspect) -> bool:
        """Whether the run goes on without this update; says so."""
        if self.policy != "skip":
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= MOST_IN_A_ROW:
            log.warning("%d updates in a row had to be left out", self.in_a_row)
            return False
        position, _ = suspect.place_to_return
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # else the schedule warns of a missing update
        log.warning(
            "step %d is left out: the loss or a gradient is not a finite number (%s); %d so far",
            position.step + 1,
            suspect.describe(),
            self.skipped,
        )
        return True
