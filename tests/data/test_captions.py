"""Caption processing against the recorded cases of sd-scripts 0.7.0 and of its later versions, draws included."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from library.data.captions import fixed, process, tags_of, variants, with_affixes
from library.data.records import SubsetSettings

GOLDEN = Path(__file__).parents[1] / "golden"
FIRST = json.loads((GOLDEN / "datasets_captions.json").read_text(encoding="utf-8"))["cases"]
LATER_VERSION = json.loads((GOLDEN / "datasets_captions_later.json").read_text(encoding="utf-8"))["cases"]

# With keep_tokens alone, 0.7.0 counts all parts in the warm-up and its later versions those that may move. The two
# files contradict each other there; 0.7.0 holds. These captions show the difference.
WARM_UP = {"token_warmup_step": 10, "keep_tokens": 1}
WARM_UP_CAPTIONS = {
    "a {x|y|z} cat, {red|blue} {{lit}} hat": "a {x|y|z} cat",
    "line one, {p|q}\nline two\nline three, r": "line one",
    "a. b. c, d": "a. b. c",
    "t1, t2, t3, t4, t5, t6": "t1, t2, t3",
}


class Recorder:
    """A generator that notes every call as the golden files do.

    It wraps one instead of deriving from it: overriding `random` would change what `shuffle` draws.
    """

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)
        self.draws: list[list] = []

    def random(self) -> float:
        value = self.generator.random()
        self.draws.append(["random", value])
        return value

    def shuffle(self, parts: list) -> None:
        self.draws.append(["shuffle", len(parts)])
        self.generator.shuffle(parts)

    def choice(self, options: list) -> object:
        value = self.generator.choice(options)
        self.draws.append(["choice", len(options), options.index(value)])
        return value


def run(case: dict) -> tuple[str, list]:
    rng = Recorder(case["seed"])
    result = process(
        case["caption"],
        SubsetSettings(**case["settings"]),
        rng,
        epoch=case["epoch"],
        step=case["step"],
        max_train_steps=case["max_train_steps"],
        replacements=[tuple(pair) for pair in case.get("replacements") or []],
    )
    return result, rng.draws


def as_recorded(draws: list, wanted: list) -> list:
    """Draws with as many numbers each as the file has (0.7.0's choices carry fewer)."""
    if len(draws) != len(wanted):
        return draws
    return [draw[: len(other)] for draw, other in zip(draws, wanted, strict=True)]


def test_every_case_of_0_7_0() -> None:
    failures = []
    for case in FIRST:
        result, draws = run(case)
        if result != case["result"] or as_recorded(draws, case["draws"]) != case["draws"]:
            failures.append((case, result, draws))
    assert failures == []


def test_every_case_of_the_later_versions() -> None:
    failures = []
    differing = set()
    for case in LATER_VERSION:
        result, draws = run(case)
        wanted = case["result"]
        if case["settings"] == WARM_UP and case["caption"] in WARM_UP_CAPTIONS:
            differing.add(case["caption"])
            assert wanted != WARM_UP_CAPTIONS[case["caption"]]
            wanted = WARM_UP_CAPTIONS[case["caption"]]
        if result != wanted or as_recorded(draws, case["draws"]) != case["draws"]:
            failures.append((case, result, draws))
    assert failures == []
    assert differing == set(WARM_UP_CAPTIONS)


def test_a_warm_up_below_one_is_a_share_of_the_run() -> None:
    subset = SubsetSettings(token_warmup_step=0.5, token_warmup_min=1)
    texts = [
        process("a, b, c, d, e", subset, random.Random(0), epoch=1, step=step, max_train_steps=8)
        for step in (0, 1, 2, 3, 4)
    ]
    assert texts == ["a", "a, b", "a, b, c", "a, b, c, d", "a, b, c, d, e"]


@pytest.mark.parametrize("caption", ["", "a, b", "x"])
def test_a_caption_is_left_alone_when_nothing_is_set(caption: str) -> None:
    rng = Recorder(0)
    assert process(caption, SubsetSettings(), rng, epoch=1, step=0, max_train_steps=1) == caption
    assert rng.draws == []


def test_prefix_and_suffix_stand_around_the_caption() -> None:
    assert with_affixes("cat", SubsetSettings(caption_prefix="a", caption_suffix="here")) == "a cat here"


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("plain {{x}}", ["plain {x}"]),
        ("{a|b} c", ["a c", "b c"]),
        ("{a|b}{c|d}", ["ac", "bc", "ad", "bd"]),
        ("{a|a}", ["a"]),
        ("one {x|y}\ntwo", ["one x", "two", "one y"]),
    ],
)
def test_all_forms_of_a_caption(caption: str, found: list[str]) -> None:
    subset = SubsetSettings(enable_wildcard=True)
    assert variants(caption, subset) == found
    drawn = {fixed(caption, subset, (), random.Random(seed)) for seed in range(60)}
    assert drawn == set(found) and fixed(caption, subset) == found[0]
    assert variants(caption, SubsetSettings()) == [caption.split("\n")[0]]


def test_too_many_forms_are_not_listed() -> None:
    assert len(variants("{a|b}" * 6, SubsetSettings(enable_wildcard=True))) == 64
    assert variants("{a|b}" * 7, SubsetSettings(enable_wildcard=True)) == []


def test_tags_are_lower_case_and_never_empty() -> None:
    assert tags_of(" One,, two ,ONE\nthree") == ["one", "two", "one", "three"]
