"""Captions: what becomes of a picture's text each time the picture is used.

Order, after sd-scripts: prefix and suffix, dropout, wildcards, parts (warm-up, shuffle, tag dropout), secondary
separator, replacements. The captions of sd-scripts 0.7.0 and of its later versions both come out of it.
"""

from __future__ import annotations

import math
import random
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from library.data.records import SubsetSettings

Replacement = tuple[str, str | list[str]]

# A caption of more forms than this is not cached.
MOST_VARIANTS = 64
_BRACES = re.compile(r"\{\{|\}\}|\{([^}]+?)\}")


def process(
    caption: str,
    subset: SubsetSettings,
    rng: random.Random,
    *,
    epoch: int,
    step: int,
    max_train_steps: int,
    replacements: Sequence[Replacement] = (),
) -> str:
    """The caption that a picture is trained with this time.

    Args:
        caption: as read from the picture's source.
        subset: the picture's subset.
        rng: generator of every draw; drawn from only where a setting asks for chance.
        epoch: 1-based, for `caption_dropout_every_n_epochs`.
        step: optimizer updates made so far, for the token warm-up.
        max_train_steps: steps of the whole run, for a warm-up that is a share of it.
        replacements: (from, to) in this order. From "" the whole caption is replaced: by a text, or by one drawn
            from a list. Every other text is replaced wherever it stands.
    """
    caption = with_affixes(caption, subset)
    if _is_dropped(subset, rng, epoch):
        return ""
    caption = _expand_wildcards(caption, rng) if subset.enable_wildcard else caption.split("\n", 1)[0]
    if subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0:
        caption = _rearrange(caption, subset, rng, step, max_train_steps)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    for source, target in replacements:
        if source == "":
            caption = rng.choice(target) if isinstance(target, list) else target
        elif isinstance(target, str):
            caption = caption.replace(source, target)
    return caption


def fixed(
    caption: str,
    subset: SubsetSettings,
    replacements: Sequence[Replacement] = (),
    rng: random.Random | None = None,
) -> str:
    """The caption as every step sees it, for subsets that change nothing by chance but wildcards.

    Args:
        rng: draws one of the `variants`; None: the first.
    """
    subset = replace(subset, caption_dropout_every_n_epochs=0)
    rng = rng or _Path(())
    return process(caption, subset, rng, epoch=1, step=0, max_train_steps=0, replacements=replacements)


def variants(caption: str, subset: SubsetSettings, replacements: Sequence[Replacement] = ()) -> list[str]:
    """Every caption that wildcards and several lines can give, the first one first; what a text cache encodes.

    Returns:
        the captions; none if there are more than `MOST_VARIANTS`.
    """
    if not subset.enable_wildcard:
        return [fixed(caption, subset, replacements)]
    found: dict[str, None] = {}
    open_paths = deque([_Path(())])
    while open_paths:
        path = open_paths.popleft()
        found[fixed(caption, subset, replacements, path)] = None
        open_paths += path.others
        if len(found) + len(open_paths) > MOST_VARIANTS:
            return []
    return list(found)


class _Path(random.Random):
    """Makes given choices, then the first ones, and notes the paths that would choose otherwise there."""

    def __init__(self, choices: tuple[int, ...]) -> None:
        super().__init__(0)
        self.choices = choices
        self.made: tuple[int, ...] = ()
        self.others: list[_Path] = []

    def choice(self, seq: Sequence[Any]) -> Any:
        given = len(self.made) < len(self.choices)
        if not given:
            self.others += [_Path((*self.made, other)) for other in range(1, len(seq))]
        self.made += (self.choices[len(self.made)] if given else 0,)
        return seq[self.made[-1]]


def with_affixes(caption: str, subset: SubsetSettings) -> str:
    """The caption between the subset's prefix and suffix; also what a cache of text outputs encodes."""
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    return caption


def tags_of(caption: str) -> list[str]:
    """The comma-separated parts of a raw caption, lower-cased, without empty ones: what tag counts count."""
    parts = (part.strip().lower() for part in caption.replace("\n", ",").split(","))
    return [part for part in parts if part]


def _is_dropped(subset: SubsetSettings, rng: random.Random, epoch: int) -> bool:
    # The draw comes first and whenever a rate is set, so that later draws do not depend on the epoch.
    by_chance = subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate
    every = subset.caption_dropout_every_n_epochs
    return by_chance or (every > 0 and epoch % every == 0)


def _expand_wildcards(caption: str, rng: random.Random) -> str:
    """One line of several; `{a|b}` becomes a or b, `{{` and `}}` become braces."""
    if "\n" in caption:
        caption = rng.choice(caption.split("\n"))

    def chosen(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return match.group(0)[0]
        return rng.choice(match.group(1).split("|"))

    return _BRACES.sub(chosen, caption)


def _rearrange(caption: str, subset: SubsetSettings, rng: random.Random, step: int, max_train_steps: int) -> str:
    def warmed_up(parts: list[str]) -> list[str]:
        return parts[: _warm_up_count(len(parts), subset, step, max_train_steps)]

    mark = subset.keep_tokens_separator
    if mark and mark in caption:
        fixed, flexible, suffix = _split_at_marks(caption, mark, subset.caption_separator)
        flexible = warmed_up(flexible)
    else:
        parts = warmed_up([part.strip() for part in caption.strip().split(subset.caption_separator)])
        kept = max(subset.keep_tokens, 0)
        fixed, flexible, suffix = parts[:kept], parts[kept:], []
    if subset.shuffle_caption:
        rng.shuffle(flexible)
    if subset.caption_tag_dropout_rate > 0:
        flexible = [part for part in flexible if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(fixed + flexible + suffix)


def _split_at_marks(caption: str, mark: str, separator: str) -> tuple[list[str], list[str], list[str]]:
    """Parts before the first mark, between the first two, and after the second; empty parts are left out."""
    front, _, rest = caption.partition(mark)
    middle, _, back = rest.partition(mark)

    def parts_of(text: str) -> list[str]:
        return [part.strip() for part in text.split(separator) if part.strip()]

    return parts_of(front), parts_of(middle), parts_of(back)


def _warm_up_count(parts: int, subset: SubsetSettings, step: int, max_train_steps: int) -> int:
    """How many of the parts are used at this step."""
    end = subset.token_warmup_step
    if end < 1:
        end = math.floor(end * max_train_steps)
    if end <= 0 or step >= end:
        return parts
    smallest = subset.token_warmup_min
    return max(0, math.floor(step * ((parts - smallest) / end)) + smallest)
