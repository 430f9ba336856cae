"""Stops a run at a non-finite loss or gradient, without a host read in the step.

The flag is computed on the device and masks the update there (fused optimizers take it as `found_inf`); it is
copied to pinned memory and read one update later. Optimizers that cannot be masked are asked at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


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
    """Watches updates; `check_last()` tells of the previous one, `watch()` masks and remembers this one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.maskable = all(group.get("fused") for group in optimizer.param_groups)
        self.last: Suspect | None = None

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
        flag, ready = bad, None
        if bad.is_cuda:
            flag = torch.empty(1, pin_memory=True)
            flag.copy_(bad, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        elif bad.device.type != "cpu":
            flag = bad.cpu()
        self.last = Suspect(flag, ready, image_keys, timesteps, place_to_return)
        if self.maskable:
            self.optimizer.found_inf = bad.reshape(())  # type: ignore[attr-defined]
            return True
        return not self.last.is_bad()

    def check_last(self) -> Suspect | None:
        """The previous update if it was not finite; asked before the next update and at the end."""
        last, self.last = self.last, None
        return last if last is not None and last.is_bad() else None
