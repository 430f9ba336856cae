"""Which requests share a batch: those that follow each other with equal key, at most `--batch_size` of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from library.generation.request import ImageRequest


class BatchQueue:
    """Collects requests into batches.

    Args:
        size: most requests of a batch.
        key: what must be equal inside a batch.
    """

    def __init__(self, size: int, key: Callable[[ImageRequest], Hashable]) -> None:
        self.size = size
        self.key = key
        self._waiting: list[ImageRequest] = []

    def add(self, request: ImageRequest) -> list[list[ImageRequest]]:
        """Take a request; gives the batches that are now ready."""
        ready = []
        if self._waiting and self.key(self._waiting[-1]) != self.key(request):
            ready += self.flush()
        self._waiting.append(request)
        if len(self._waiting) == self.size:
            ready += self.flush()
        return ready

    def flush(self) -> list[list[ImageRequest]]:
        """The requests that still wait, as one batch."""
        waiting, self._waiting = self._waiting, []
        return [waiting] if waiting else []
