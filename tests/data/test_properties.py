"""What holds for every picture size, folder and caption: cuts, repeats, held-out pictures and caption steps."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import BucketRule, bucket_sizes, covering, crop_ltrb
from library.data.captions import process
from library.data.images import crop_to_bucket
from library.data.records import DatasetSettings, Item, SubsetSettings
from library.data.sources import balance
from library.data.validation import hold_out

SIDES = st.integers(8, 160)
SIZES = st.tuples(SIDES, SIDES)
WORDS = st.lists(st.text("abcxyz ", min_size=1, max_size=6).filter(lambda text: text.strip()), max_size=8)


def run(caption: str, seed: int = 0, *, step: int = 0, **settings: object) -> str:
    subset = SubsetSettings(**settings)
    return process(caption, subset, random.Random(seed), epoch=1, step=step, max_train_steps=100)


@given(size=SIZES, base=st.integers(64, 96), seed=st.none() | st.integers(0, 99))
def test_a_cut_lies_in_the_picture_and_has_the_buckets_size(size: tuple, base: int, seed: int | None) -> None:
    rule = BucketRule(bucket_sizes((base, base), 32, 128, 32))
    fit = rule.fit(size)
    assert all(inner <= outer for inner, outer in zip(fit.bucket, fit.resized, strict=True))
    assert any(inner == outer for inner, outer in zip(fit.bucket, fit.resized, strict=True))
    image = np.zeros((size[1], size[0], 3), np.uint8)
    draw = None if seed is None else random.Random(seed)
    cut, (left, top) = crop_to_bucket(image, fit.bucket, fit.resized, draw=draw)
    assert cut.shape == (fit.bucket[1], fit.bucket[0], 3)
    assert 0 <= left <= fit.resized[0] - fit.bucket[0] and 0 <= top <= fit.resized[1] - fit.bucket[1]
    if draw is None:
        assert (left, top) == tuple((o - i) // 2 for i, o in zip(fit.bucket, fit.resized, strict=True))


@given(size=SIZES, bucket=st.tuples(*[st.sampled_from((32, 64, 96))] * 2))
def test_told_crops_are_a_fit_inside_the_bucket(size: tuple, bucket: tuple) -> None:
    left, top, right, bottom = crop_ltrb(bucket, size)
    assert 0 <= left <= right <= bucket[0] + 1e-6 and 0 <= top <= bottom <= bucket[1] + 1e-6
    assert abs((right - left) / (bottom - top) - size[0] / size[1]) < 1e-6 * size[0]
    resized = covering(bucket, size).resized
    assert min(r - b for r, b in zip(resized, bucket, strict=True)) == 0


@given(repeats=st.lists(st.integers(1, 5), max_size=12), target=st.integers(0, 60))
def test_regularisation_pictures_fill_up_to_the_target(repeats: list[int], target: int) -> None:
    pictures = [Item(str(i), "", "", (8, 8), repeats=times, is_reg=True) for i, times in enumerate(repeats)]
    used = balance(pictures, target)
    total = sum(item.repeats for item in used)
    assert used == pictures[: len(used)]
    if not repeats or not target:
        assert used == []
        return
    assert target <= total < target + max(repeats)
    added = [item.repeats - own for item, own in zip(used, repeats, strict=False)]
    assert max(added) - min(added) <= 1 and added == sorted(added, reverse=True)
    if max(added):
        assert total == target and len(used) == len(pictures)


@given(count=st.integers(0, 30), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_held_out_pictures_are_a_share_and_no_other(count: int, share: float, seed: int) -> None:
    items = [Item(f"{i:02}", f"{i:02}", "", (8, 8), repeats=2) for i in range(count)]
    train, rest = hold_out(items, DatasetSettings(validation_split=share, validation_seed=seed), 0)
    assert len(rest) == round(count * share)
    assert sorted(item.key for item in (*train, *rest)) == [item.key for item in items]
    again = hold_out(items, DatasetSettings(validation_split=share, validation_seed=seed), 5)
    assert [item.key for item in again[1]] == [item.key for item in rest]


@given(words=WORDS, seed=st.integers(0, 99), keep=st.integers(0, 4))
def test_shuffling_keeps_every_part_and_the_first_ones_in_place(words: list[str], seed: int, keep: int) -> None:
    parts = [word.strip() for word in words]
    found = run(",".join(words), seed, shuffle_caption=True, keep_tokens=keep).split(", ")
    assert Counter(found) == Counter(parts or [""])
    assert found[:keep] == (parts or [""])[:keep]


@given(words=WORDS, seed=st.integers(0, 99), rate=st.floats(0, 1), keep=st.integers(0, 4))
def test_dropped_parts_leave_the_others_in_order(words: list[str], seed: int, rate: float, keep: int) -> None:
    parts = [word.strip() for word in words] or [""]
    text = run(",".join(words), seed, caption_tag_dropout_rate=rate, keep_tokens=keep)
    if rate == 0:
        assert text == ",".join(words)
        return
    rest = iter(parts)
    kept = text.split(", ") if text else []
    assert all(part in rest for part in kept)  # a subsequence
    assert kept[:keep] == parts[:keep] or not text
    if rate == 1:
        assert text == ", ".join(parts[:keep])


@given(words=WORDS, step=st.integers(0, 60), end=st.integers(1, 50), least=st.integers(0, 3))
def test_a_warm_up_gives_the_first_parts_and_in_the_end_all(words: list[str], step: int, end: int, least: int) -> None:
    parts = [word.strip() for word in words] or [""]
    text = run(",".join(words), step=step, token_warmup_step=end, token_warmup_min=least)
    count = len(text.split(", ")) if text else 0
    assert ", ".join(parts).startswith(text)
    assert step < end or text == ", ".join(parts)
    assert count >= min(least, len(parts)) or "" in parts


@given(text=st.text("ab,{}| \n", max_size=20), seed=st.integers(0, 9))
def test_captions_follow_from_the_seed_alone(text: str, seed: int) -> None:
    settings = {"enable_wildcard": True, "shuffle_caption": True, "caption_tag_dropout_rate": 0.3}
    assert run(text, seed, **settings) == run(text, seed, **settings)
    assert run(text, seed, caption_dropout_rate=1.0) == ""
    assert run(text, seed) == text.split("\n")[0]
