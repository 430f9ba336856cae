"""After the first steps: has every part that trains changed?

What is compared are the norms of the weights, taken on the device before the first step and read at the first point
where the log reads from it anyway, so that a quiet step stays quiet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from library.messages import log

if TYPE_CHECKING:
    from library.training.run import Run

# A gradient scaler leaves its first updates out until its scale fits.
UPDATES_OF_A_SCALER = 20


class MovedCheck:
    """Warns once of parts that stay as they were."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] | None = None
        self.first_step = 0

    def start(self, run: Run) -> None:
        """Before the first step of this program, resumed or not."""
        if all(group["params"] for group in run.optimizer.param_groups):  # DeepSpeed's stage 3 takes them away
            self.before = _norms(run)
        self.first_step = run.position.step

    def after_flush(self, run: Run) -> None:
        """Compare, once updates at a rate above 0 were made."""
        if self.before is None or run.log.entries:
            return
        updates = run.position.step - self.first_step - run.guard.skipped
        needed = UPDATES_OF_A_SCALER if run.scaler is not None else 2  # a warm-up begins with a rate of 0
        if updates < min(needed, run.max_steps - self.first_step):
            return
        now, before, self.before = _norms(run), self.before, None
        moved = torch.stack([(a != b).any() for a, b in zip(before, now, strict=True)]).tolist()
        for name, group, changed in zip(run.log.group_names, run.optimizer.param_groups, moved, strict=True):
            if not changed and updates > 0:
                rate = "its own rate" if group["lr"] is None else f"rate {float(group['lr']):g}"
                log.warning(
                    "%s: none of its weights has changed in %d steps at %s; raise its learning rate, or see whether "
                    "anything that it makes reaches the loss",
                    name,
                    updates,
                    rate,
                )


@torch.no_grad()
def _norms(run: Run) -> list[torch.Tensor]:
    """For each group the norms of its weights (of this process's part), exact enough to show the smallest change."""
    exact = torch.float32 if run.processes.device.type == "mps" else torch.float64
    return [
        torch.stack([torch.linalg.vector_norm(_local(p), dtype=exact) for p in group["params"]])
        for group in run.optimizer.param_groups
    ]


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()
