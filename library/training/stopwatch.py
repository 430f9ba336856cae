"""How long updates take, and how much of that the loop waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


class Stopwatch:
    """Time since the last reading, without what was set aside (pictures, saves, validation)."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()
        self._waited = 0.0

    def waiting(self, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """Hand on the items; the time until each is there counts as waiting."""
        iterator = iter(items)
        while True:
            begun = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begun
            yield item

    def read(self) -> tuple[float, float]:
        """(seconds since the last reading or restart, of which the loop waited for data); starts anew.

        To be asked after a read from the device, when the work that was handed to it is done.
        """
        seconds, waited = time.perf_counter() - self._since, self._waited
        self.restart()
        return seconds, waited
