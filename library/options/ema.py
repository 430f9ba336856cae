"""Moving average of what is trained."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """Moving average of what is trained."""

    ema_decay: float | None = option(
        None, "keep a moving average of the trained weights with this decay, e.g. 0.999, and save it beside them"
    )
    ema_start: int = option(0, "updates before the average begins; until then it equals the weights")
    ema_device: str | None = option(
        None,
        "where the average is kept: cpu spares GPU memory; beside the weights when left out",
        choices=(None, "cpu"),
    )
