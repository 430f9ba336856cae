"""Memory: running out of it, told as a sentence, and garbage collection at chosen steps."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from library.messages import UserError

if TYPE_CHECKING:
    import torch

_OUT_OF_MEMORY = re.compile(
    r"out of memory|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory"
    r"|not enough memory|UR_RESULT_ERROR_OUT_OF_(DEVICE|HOST)_MEMORY|HIP out of memory",
    re.IGNORECASE,
)

TRAINING_REMEDIES = ("--gradient_checkpointing", "a smaller --train_batch_size", "a smaller --resolution")
GENERATION_REMEDIES = ("a smaller --batch_size", "a smaller --W and --H", "--fp16 or --bf16")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that device or main memory is used up, by its type or its words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


@contextlib.contextmanager
def explained_out_of_memory(doing: str, remedies: Sequence[str] = TRAINING_REMEDIES) -> Iterator[None]:
    """Turn running out of memory inside the block into one line that names options that help.

    Args:
        doing: what was going on, e.g. "training at step 12".
        remedies: options, the most helpful first.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory while {doing}", _try(remedies)) from error


def _try(remedies: Sequence[str]) -> str:
    if len(remedies) > 3:
        return f"try, the most helpful first: {'; '.join(remedies)}"
    return f"try {', '.join(remedies[:-1])} or {remedies[-1]}" if len(remedies) > 1 else f"try {remedies[0]}"


def peak_bytes(device: torch.device) -> int | None:
    """Most memory in use at once so far: the GPU's where there is one, else this process's; None if nobody knows."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class GarbageCollection:
    """Collect at every `every`-th step instead of whenever Python likes, so that all processes pause together.

    A context manager: inside it automatic collection is off; `step` is called once a step.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self._was_enabled = True

    def __enter__(self) -> GarbageCollection:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        return self

    def step(self, number: int) -> None:
        """Step `number` is done. Young generations only: models and data sets need not be walked again."""
        if number % self.every == 0:
            gc.collect(1)

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            gc.enable()
