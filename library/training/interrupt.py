"""Ctrl-C and SIGTERM: the first asks the loop to finish the step and save, the second stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from library.messages import log


class InterruptFlag:
    """Context manager that turns the first signal into `requested` and restores the old handlers at the second."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        log.warning("stopping after this step; the state will be saved (once more to stop at once)")
