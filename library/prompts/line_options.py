"""Options inside a prompt line: `a cat --w 512 --d 7 --n blurry`.

The line is split at " --" (blank, minus, minus). Each item after the first is a name, exactly one blank and a value;
what follows the value inside the item does not count (`--w 64x` is 64). Names ignore case, the last of equal names
wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class LineItem:
    """One option that a prompt line may hold: its name, what its value looks like, and the field it sets."""

    name: str
    pattern: str
    target: str
    convert: Callable[[str], Any]

    def match(self, item: str) -> re.Match[str] | None:
        """The value at the start of an item, or None if the item is another option."""
        return re.match(rf"{self.name} ({self.pattern})", item, re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ParsedLine:
    """A prompt line taken apart.

    Attributes:
        prompt: the text before the first option, inner and trailing blanks kept.
        values: field -> value of the options that were understood.
        not_understood: the items that were not, each with the reason.
    """

    prompt: str
    values: dict[str, Any] = field(default_factory=dict)
    not_understood: list[tuple[str, str]] = field(default_factory=list)


def _steps(text: str) -> int:
    return max(1, min(1000, int(text)))


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _float_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


_DIGITS = r"\d+"
_DECIMAL = r"[\d.]+"

SIZE_ITEMS = (LineItem("w", _DIGITS, "width", int), LineItem("h", _DIGITS, "height", int))

PICTURE_ITEMS = (
    *SIZE_ITEMS,
    LineItem("s", _DIGITS, "steps", _steps),
    LineItem("d", r"[\d,]+", "seeds", _integers),
    LineItem("l", _DECIMAL, "scale", float),
    LineItem("nl", r"[\d.]+|none", "negative_scale", _float_or_none),
    LineItem("t", _DECIMAL, "strength", float),
    LineItem("n", r".+", "negative_prompt", str),
    LineItem("c", r".+", "clip_prompt", str),
    LineItem("am", r"[\d.,-]+", "network_multipliers", _floats),
)

SIZE_CONDITION_ITEMS = (
    LineItem("ow", _DIGITS, "original_width", int),
    LineItem("oh", _DIGITS, "original_height", int),
    LineItem("nw", _DIGITS, "original_width_negative", int),
    LineItem("nh", _DIGITS, "original_height_negative", int),
    LineItem("ct", _DIGITS, "crop_top", int),
    LineItem("cl", _DIGITS, "crop_left", int),
)

SAMPLE_ITEMS = (
    *SIZE_ITEMS,
    LineItem("d", _DIGITS, "seed", int),
    LineItem("s", _DIGITS, "steps", _steps),
    LineItem("l", _DECIMAL, "scale", float),
    LineItem("g", _DECIMAL, "guidance_scale", float),
    LineItem("n", r".+", "negative_prompt", str),
    LineItem("ss", r"\S+", "sampler", str),
    LineItem("cn", r".+", "control_image", str),
)


def parse_line(line: str, items: Sequence[LineItem] = PICTURE_ITEMS) -> ParsedLine:
    """Take a prompt line apart.

    Args:
        line: the line; blanks around it do not count. A line that begins with `--` is a prompt as a whole
            up to its first " --".
        items: the options that count here; a name that is not among them is not understood.
    """
    prompt, *rest = line.strip().split(" --")
    parsed = ParsedLine(prompt)
    for text in rest:
        _read_item(text, items, parsed)
    return parsed


def _read_item(text: str, items: Sequence[LineItem], parsed: ParsedLine) -> None:
    for item in items:
        match = item.match(text)
        if match is None:
            continue
        try:
            parsed.values[item.target] = item.convert(match[1])
        except ValueError as error:
            parsed.not_understood.append((text, str(error)))
        return
    parsed.not_understood.append((text, "no such option, or no value of its kind after exactly one blank"))
