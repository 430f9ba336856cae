"""A picture request with every value resolved, and the key that says which requests may share a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One picture. Everything that decides its pixels stands here or in the engine's models.

    Attributes:
        prompt, negative_prompt: text with emphasis marks, as typed.
        width, height: pixels.
        steps: sampler steps; scale: guidance (<= 1 switches it off); negative_scale: third guidance branch.
        seed: of the picture's own generator (start noise and sampler noise).
        strength: share of the schedule that image to image runs, or None.
        network_multipliers: one per network that is not merged, or None for the defaults.
        original_size, crop, target_size: (height, width) / (top, left) for families with size conditioning.
        negative_original_size: the negative side's, or None for the same.
        sampler: name of the sampler, or None for the engine's.
        clip_prompt: text for guidance by CLIP, kept in the metadata.
        image, mask, guide_image: PIL pictures for the passes that take them.
        index: number of the picture in its iteration; raw_line: the prompt line it came from.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    steps: int = 50
    scale: float = 7.5
    negative_scale: float | None = None
    seed: int
    strength: float | None = None
    network_multipliers: tuple[float, ...] | None = None
    original_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    sampler: str | None = None
    clip_prompt: str | None = None
    image: Any = None
    mask: Any = None
    guide_image: Any = None
    index: int = 0
    raw_line: str = ""

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """What must be equal among the requests of a batch."""
        return (
            self.width,
            self.height,
            self.original_size,
            self.negative_original_size,
            self.crop,
            self.steps,
            self.scale,
            self.negative_scale,
            self.strength,
            self.network_multipliers,
            self.sampler,
        )
