"""Dynamic prompts: `{red|blue}`, `{2$$a|b|c}`, `{1-2$$ and $$a|b|c}`, and `{e$$a|b}` that enumerates."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

from library.messages import log

_GROUP = re.compile(
    r"\{(?P<enumerate>[eE]\$\$)?(?:(?P<count>[\d-]+)\$\$)?(?:(?P<separator>[^|}]+?)\$\$)?(?P<variants>.+?)\}"
)
DEFAULT_SEPARATOR = ", "


@dataclass(frozen=True, slots=True)
class Group:
    """One `{...}` of a prompt: how many of which variants, joined by what."""

    text: str
    variants: list[str]
    lowest: int
    highest: int
    separator: str
    enumerates: bool

    def draw(self, rng: random.Random) -> str:
        """One random choice."""
        count = rng.randint(self.lowest, self.highest)
        return self.separator.join(rng.sample(self.variants, count))

    def all(self) -> list[str]:
        """Every combination, smaller ones first."""
        counts = range(self.lowest, self.highest + 1)
        combinations = itertools.chain.from_iterable(itertools.combinations(self.variants, n) for n in counts)
        return [self.separator.join(combination) for combination in combinations]


def groups_of(prompt: str) -> list[Group]:
    """The groups of a prompt in order; a group cannot hold another one."""
    return [_group(match) for match in _GROUP.finditer(prompt)]


def is_dynamic(prompt: str) -> bool:
    """True if the prompt has at least one group."""
    return _GROUP.search(prompt) is not None


def is_enumerating(prompt: str) -> bool:
    """True if the prompt names all its combinations itself, so that a count of pictures does not apply."""
    return any(group.enumerates for group in groups_of(prompt))


def expand(prompt: str, count: int, rng: random.Random) -> list[str]:
    """A prompt with groups -> `count` random variants, or all combinations of its enumerating groups.

    A prompt without groups comes back alone, and nothing is drawn.
    """
    groups = groups_of(prompt)
    if not groups:
        return [prompt]
    if any(group.enumerates for group in groups):
        return _enumerate(prompt, groups, rng)
    return [_replace_all(prompt, groups, rng) for _ in range(count)]


def _replace_all(prompt: str, groups: list[Group], rng: random.Random) -> str:
    for group in groups:
        prompt = prompt.replace(group.text, group.draw(rng), 1)
    return prompt


def _enumerate(prompt: str, groups: list[Group], rng: random.Random) -> list[str]:
    prompts = [prompt]
    for group in groups:
        if group.enumerates:
            prompts = [old.replace(group.text, choice, 1) for old in prompts for choice in group.all()]
    others = [group for group in groups if not group.enumerates]
    for group in others:
        prompts = [old.replace(group.text, group.draw(rng), 1) for old in prompts]
    return prompts


def _group(match: re.Match[str]) -> Group:
    variants = match["variants"].split("|")
    lowest, highest = _counts(match["count"], match[0])
    highest = min(highest, len(variants))
    separator = match["separator"]
    return Group(
        text=match[0],
        variants=variants,
        lowest=min(lowest, highest),
        highest=highest,
        separator=DEFAULT_SEPARATOR if separator is None else separator,
        enumerates=match["enumerate"] is not None,
    )


def _counts(text: str | None, group: str) -> tuple[int, int]:
    if text is None:
        return 1, 1
    parts = text.split("-")
    if len(parts) > 2 or not all(parts):
        log.warning(f'count "{text}" of {group} is not understood: use a number or a range like 1-2; taken as 1')
        return 1, 1
    numbers = sorted(int(part) for part in parts)
    return numbers[0], numbers[-1]
