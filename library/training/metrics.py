"""What a run shows while it goes: the loss averaged over an epoch's length, and the values of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NORM_KEYS = {
    "keys_scaled": "max_norm/keys_scaled",
    "mean_norm": "max_norm/average_key_norm",
    "maximum_norm": "max_norm/max_key_norm",
    "mean_grad_norm": "norm/avg_grad_norm",
    "mean_combined_norm": "norm/avg_combined_norm",
}


class LossRecorder:
    """Average of the latest loss of every place in an epoch.

    In the first epoch it averages what has been seen; later each micro-step replaces the loss that its place had
    an epoch before, so the average always covers one epoch's length of micro-steps.
    """

    def __init__(self) -> None:
        self._losses: dict[int, float] = {}
        self._total = 0.0

    def add(self, *, epoch: int, step: int, loss: float) -> None:
        """Note the loss of micro-step `step` (from 0) of epoch `epoch` (from 0); one that is not finite is left out."""
        if not math.isfinite(loss):
            return
        self._total += loss - self._losses.get(step, 0.0)
        self._losses[step] = loss

    @property
    def moving_average(self) -> float:
        """The average, 0 before the first loss."""
        return self._total / len(self._losses) if self._losses else 0.0

    def state(self) -> dict[str, Any]:
        """Plain data from which `load_state` restores the recorder exactly."""
        return {"places": list(self._losses), "losses": list(self._losses.values()), "total": self._total}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._losses = dict(zip(state["places"], state["losses"], strict=True))
        self._total = state["total"]


def step_logs(
    current_loss: float,
    average_loss: float,
    rates: Sequence[float],
    names: Sequence[str] | None = None,
    *,
    optimizer: Any = None,
    **values: Any,
) -> dict[str, Any]:
    """The values of one micro-step by their keys in the trackers.

    Args:
        current_loss, average_loss: of this step, and of the recorder after it.
        rates: the schedule's rate of each optimizer group.
        names: what each group is called; None = `group0`, `group1`, ...
        optimizer: asked for the step size that adaptive optimizers found.
        values: norms by the names of `NORM_KEYS` (None: not measured); others are logged as they are called.
    """
    logs: dict[str, Any] = {"loss/current": current_loss, "loss/average": average_loss}
    logs.update({NORM_KEYS.get(name, name): value for name, value in values.items() if value is not None})
    logs.update(rate_logs(rates, names, optimizer))
    return logs


def model_step_logs(
    current_loss: float,
    average_loss: float,
    rates: Sequence[float],
    names: Sequence[str],
    *,
    optimizer: Any = None,
    **values: Any,
) -> dict[str, Any]:
    """The same for the scripts that train whole models: `loss`, and `lr` of the first part unless blocks have rates."""
    logs: dict[str, Any] = {"loss": current_loss, "loss/average": average_loss}
    logs.update({NORM_KEYS.get(name, name): value for name, value in values.items() if value is not None})
    by_name = rate_logs(rates, names, optimizer)
    if len(names) == 1:
        by_name.pop(f"lr/{names[0]}")
    if not names[0].startswith("block"):
        logs["lr"] = rates[0]
    return {**logs, **by_name}


def rate_logs(rates: Sequence[float], names: Sequence[str] | None = None, optimizer: Any = None) -> dict[str, float]:
    """`lr/<name>` of each group; for adaptive optimizers `lr/d*lr`.

    That one comes by name too where the groups are more than two or have step sizes of their own.
    """
    names = names or [f"group{index}" for index in range(len(rates))]
    logs = {f"lr/{name}": rate for name, rate in zip(names, rates, strict=True)}
    groups = getattr(optimizer, "param_groups", ())
    found = [group["d"] * group["lr"] for group in groups if "d" in group]
    if found:
        logs["lr/d*lr"] = found[0]
    if len(found) > 2 or (found and len(getattr(optimizer, "pieces", ())) > 1):
        logs.update({f"lr/d*lr/{name}": rate for name, rate in zip(names, found, strict=True)})
    return logs
