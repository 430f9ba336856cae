"""A picture request with every value resolved, and the key that says which requests may share a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCondition:
    """What a model with size conditioning is told besides the picture's size; None where the user says nothing."""

    original_height: int | None = None
    original_width: int | None = None
    original_height_negative: int | None = None
    original_width_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None

    def rows(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """(original height, width, crop top, left, target height, width) of the prompt's and the negative's side."""
        original = [_or(self.original_height, height), _or(self.original_width, width)]
        negative = [_or(self.original_height_negative, original[0]), _or(self.original_width_negative, original[1])]
        rest = [self.crop_top or 0, self.crop_left or 0, height, width]
        return [*original, *rest], [*negative, *rest]


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


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
        sizes: for families with size conditioning, or None.
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
    sizes: SizeCondition | None = None
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
            self.sizes,
            self.steps,
            self.scale,
            self.negative_scale,
            self.strength,
            self.network_multipliers,
            self.sampler,
        )
