"""Random streams: every draw comes from a generator named by what it is for and where it happens.

A generator depends on (seed, name, step, item) alone, never on earlier draws, the number of workers or of
processes. So any worker count gives the same run, and a resume in the middle of an epoch is exact.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, name: str, step: int = 0, item: int | str = 0) -> int:
    """A 63-bit seed that is a function of its arguments alone (BLAKE2b)."""
    key = f"{seed}\0{name}\0{step}\0{item}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def stream(seed: int, name: str, step: int = 0, item: int | str = 0, device: str = "cpu") -> torch.Generator:
    """A torch generator for one purpose at one place.

    Args:
        seed: the run's seed.
        name: what is drawn: `noise`, `timestep`, `dropout`, `caption`, `augmentation`, `modules`, ...
        step: micro-step or epoch, as the purpose asks.
        item: position or key of the item inside the step.
        device: where the generator draws.
    """
    import torch

    return torch.Generator(device=device).manual_seed(stream_seed(seed, name, step, item))


def python_stream(seed: int, name: str, step: int = 0, item: int | str = 0) -> random.Random:
    """The same for code that draws with the standard library (captions, crops, flips, shuffles)."""
    return random.Random(stream_seed(seed, name, step, item))
