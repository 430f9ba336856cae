"""What holds for every data set: each use of a picture once an epoch, the same whatever the workers, processes and
starting point; crops inside pictures; captions that lose and gain nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data import captions, images
from library.data.buckets import bucket_rule, bucket_sizes, covering, crop_ltrb
from library.data.group import DatasetGroup, build_group
from library.data.images import Face, crop_around_face, crop_exact, crop_to_bucket
from library.data.loader import make_loader
from library.data.records import DatasetSettings, Item, SubsetSettings
from library.data.sources import balance, scan
from library.messages import UserError
from tests.data.conftest import ByteTokens, same

SIDES = st.integers(1, 3000)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Buckets


@given(
    size=st.tuples(SIDES, SIDES),
    base=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    step=st.sampled_from([8, 32, 64]),
    limits=st.tuples(st.integers(1, 10), st.integers(10, 40)),
)
def test_the_nearest_bucket_is_taken(
    size: tuple[int, int], base: tuple[int, int], step: int, limits: tuple[int, int]
) -> None:
    resolution = (base[0] * step, base[1] * step)
    smallest, largest = limits[0] * step, limits[1] * step
    try:
        rule = bucket_rule(resolution, enable=True, smallest=smallest, largest=largest, step=step)
    except UserError:
        assume(False)
    fit = rule.fit(size)
    sizes = bucket_sizes(resolution, smallest, largest, step)
    assert fit.bucket in sizes
    assert all(width * height <= resolution[0] * resolution[1] and max(width, height) <= largest
               for width, height in sizes if width != height)  # fmt: skip
    ratio = size[0] / size[1]
    if size not in sizes:
        assert abs(fit.bucket[0] / fit.bucket[1] - ratio) == min(abs(w / h - ratio) for w, h in sizes)
    assert fit.ratio_error == fit.bucket[0] / fit.bucket[1] - ratio
    # one side matches, the other covers
    assert fit.resized[0] >= fit.bucket[0] and fit.resized[1] >= fit.bucket[1]
    assert fit.resized[0] == fit.bucket[0] or fit.resized[1] == fit.bucket[1]
    assert rule.fit(size) == fit


@given(base=st.tuples(SIDES, SIDES), limits=st.tuples(SIDES, SIDES), step=st.integers(1, 128))
def test_lists_of_buckets(base: tuple[int, int], limits: tuple[int, int], step: int) -> None:
    try:
        sizes = bucket_sizes(base, *sorted(limits), step)
    except UserError as error:
        assert error.remedy
        return
    assert sizes == sorted(set(sizes))
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert min(min(size) for size in sizes) > 0


# Crops


@st.composite
def crop(draw: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    size = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    bucket = draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    return size, bucket


def numbered(size: tuple[int, int]) -> np.ndarray:
    """A picture in which every pixel says where it is."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return np.stack([x, y, x * 0], -1).astype(np.uint8)


@given(sizes=crop(), seed=st.none() | st.integers(0, 99))
def test_a_crop_is_a_window_of_the_resized_picture(
    sizes: tuple[tuple[int, int], tuple[int, int]], seed: int | None
) -> None:
    size, bucket = sizes
    fit = covering(bucket, size)
    draw = None if seed is None else random.Random(seed)
    picture = numbered(size)
    cut, (left, top) = crop_to_bucket(picture, bucket, fit.resized, draw=draw, interpolation="nearest")
    whole = images.resize(picture, fit.resized, "nearest")
    assert cut.shape == (bucket[1], bucket[0], 3)
    assert 0 <= left <= fit.resized[0] - bucket[0] and 0 <= top <= fit.resized[1] - bucket[1]
    assert np.array_equal(cut, whole[top : top + bucket[1], left : left + bucket[0]])
    if seed is None:
        assert (left, top) == ((fit.resized[0] - bucket[0]) // 2, (fit.resized[1] - bucket[1]) // 2)


@given(size=st.tuples(st.integers(1, 60), st.integers(1, 60)), base=st.tuples(st.integers(1, 60), st.integers(1, 60)),
       seed=st.none() | st.integers(0, 99))  # fmt: skip
def test_without_buckets_a_cut_has_the_training_size(
    size: tuple[int, int], base: tuple[int, int], seed: int | None
) -> None:
    draw = None if seed is None else random.Random(seed)
    try:
        cut = crop_exact(numbered(size), base, draw, "a.png")
    except UserError as error:
        assert "a.png" in error.problem
        assert size != base and (draw is None or size[0] < base[0] or size[1] < base[1])
        return
    assert cut.shape == (base[1], base[0], 3)
    left, top = (int(value) for value in cut[0, 0, :2])
    assert np.array_equal(cut, numbered(size)[top : top + base[1], left : left + base[0]])


@given(data=st.data(), size=st.tuples(st.integers(20, 200), st.integers(20, 200)), random_crop=st.booleans())
def test_a_cut_around_a_face_stays_in_the_picture(data: Any, size: tuple[int, int], random_crop: bool) -> None:
    base = data.draw(st.tuples(st.integers(8, 64), st.integers(8, 64)))
    face = Face(data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1])),
                *data.draw(st.tuples(st.integers(1, 100), st.integers(1, 100))))  # fmt: skip
    low = data.draw(st.floats(0.5, 4))
    face_range = (low, low + data.draw(st.floats(0, 4)))
    draw = random.Random(data.draw(st.integers(0, 99)))
    try:
        cut, scaled, (left, top) = crop_around_face(
            numbered(size), base, face, face_range, draw, random_crop=random_crop, path="a.png"
        )
    except UserError as error:
        assert "a.png" in error.problem and (size[0] < base[0] or size[1] < base[1])
        return
    assert cut.shape == (base[1], base[0], 3)
    assert 0 <= left <= scaled[0] - base[0] and 0 <= top <= scaled[1] - base[1]
    assert scaled[0] <= size[0] and scaled[1] <= size[1]


@given(bucket=st.tuples(SIDES, SIDES), size=st.tuples(SIDES, SIDES), flipped=st.booleans())
def test_what_sdxl_is_told_lies_in_the_bucket(bucket: tuple[int, int], size: tuple[int, int], flipped: bool) -> None:
    """To one pixel: the numbers come from divisions of floats, as the original makes them."""
    top, left = images.crop_top_left(crop_ltrb(bucket, size), bucket, flipped)
    assert -1 <= top <= bucket[1] and -1 <= left <= bucket[0] + 1
    assert top <= 1 or left <= 1  # one axis fits


# Repeats


@given(repeats=st.lists(st.integers(1, 6), max_size=12), target=st.integers(0, 60))
def test_regularisation_pictures_make_up_the_target(repeats: list[int], target: int) -> None:
    pictures = [Item(str(number), "", "", (1, 1), times) for number, times in enumerate(repeats)]
    used = balance(pictures, target)
    assert [item.key for item in used] == [str(number) for number in range(len(used))]
    total = sum(item.repeats for item in used)
    if target == 0 or not repeats:
        assert not used
        return
    assert total >= target
    if sum(repeats) >= target:  # one pass is enough: nobody gets more than its own, and the last one was needed
        assert [item.repeats for item in used] == repeats[: len(used)]
        assert total - repeats[len(used) - 1] < target
    else:
        more = [item.repeats - own for item, own in zip(used, repeats, strict=True)]
        assert total == target and more == sorted(more, reverse=True) and more[0] - more[-1] <= 1


# Captions

WORDS = st.lists(st.text("abcxyz 猫_", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1, max_size=8)


def process(caption: str, subset: SubsetSettings, seed: int, **options: Any) -> str:
    given_ = {"epoch": 1, "step": 0, "max_train_steps": 100, **options}
    return captions.process(caption, subset, random.Random(seed), **given_)


@given(words=WORDS, keep=st.integers(0, 9), seed=st.integers(0, 999))
def test_shuffling_keeps_every_part(words: list[str], keep: int, seed: int) -> None:
    subset = SubsetSettings(shuffle_caption=True, keep_tokens=keep)
    parts = process(", ".join(words), subset, seed).split(", ")
    assert Counter(parts) == Counter(words)
    assert parts[:keep] == words[:keep]
    assert parts == process(",".join(words), subset, seed).split(", ")


@given(words=WORDS, keep=st.integers(0, 9), rate=st.floats(0, 1), seed=st.integers(0, 999))
def test_dropped_parts_leave_the_rest_in_order(words: list[str], keep: int, rate: float, seed: int) -> None:
    subset = SubsetSettings(caption_tag_dropout_rate=rate, keep_tokens=keep)
    parts = [part for part in process(", ".join(words), subset, seed).split(", ") if part]
    assert parts[:keep] == words[:keep]
    rest = iter(words)
    assert all(part in rest for part in parts)  # a subsequence
    assert rate > 0 or parts == words
    assert rate < 1 or parts == words[:keep]


@given(words=WORDS, smallest=st.integers(0, 4), end=st.integers(1, 50), step=st.integers(0, 60))
def test_warm_up_grows_to_the_whole_caption(words: list[str], smallest: int, end: int, step: int) -> None:
    subset = SubsetSettings(token_warmup_min=smallest, token_warmup_step=end)
    texts = [process(", ".join(words), subset, 1, step=at) for at in (step, step + 1)]
    first, second = (text.split(", ") if text else [] for text in texts)
    assert first == words[: len(first)] and second[: len(first)] == first
    assert step < end or first == words
    assert step > 0 or len(first) == min(smallest, len(words))


@given(words=WORDS, prefix=st.text("pq", max_size=3), suffix=st.text("st", max_size=3), seed=st.integers(0, 99),
       rate=st.floats(0, 1), every=st.integers(0, 3), epoch=st.integers(1, 9))  # fmt: skip
def test_a_caption_is_whole_or_empty(
    words: list[str], prefix: str, suffix: str, seed: int, rate: float, every: int, epoch: int
) -> None:
    subset = SubsetSettings(
        caption_prefix=prefix, caption_suffix=suffix, caption_dropout_rate=rate, caption_dropout_every_n_epochs=every
    )
    text = process(", ".join(words), subset, seed, epoch=epoch)
    whole = " ".join(part for part in (prefix, ", ".join(words), suffix) if part)
    assert text in (whole, "")
    if every and epoch % every == 0:
        assert text == ""
    elif rate == 0:
        assert text == whole


@given(options=st.lists(st.text("abc ", min_size=1, max_size=3), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_wildcards_choose_one(options: list[str], seed: int) -> None:
    subset = SubsetSettings(enable_wildcard=True)
    text = process("x {" + "|".join(options) + "} {{y}}", subset, seed)
    assert text in {f"x {option} {{y}}" for option in options}


# The whole way


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with a dozen small pictures of several shapes, captions of several parts."""
    root = tmp_path_factory.mktemp("pictures")
    shapes = [(40, 40), (64, 32), (32, 64), (50, 40), (41, 40), (96, 32)]
    for folder in ("one", "two"):
        (root / folder).mkdir()
        for number, size in enumerate(shapes):
            pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
            (root / folder / f"{number}.txt").write_text(f"{folder}, {number}, a, b, c", encoding="utf-8")
    return root


CHOICES = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 5),
        "repeats": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "is_reg": st.booleans(),
        "enable_bucket": st.booleans(),
        "options": st.sets(st.sampled_from(["flip_aug", "color_aug", "random_crop", "shuffle_caption"])),
        "drop": st.sampled_from([0.0, 0.4]),
        "warm_up": st.sampled_from([0, 3]),
        "two_sizes": st.booleans(),
    }
)


def make(pictures: Path, choice: dict[str, Any]) -> DatasetGroup:
    options = dict.fromkeys(choice["options"], True)
    if not choice["enable_bucket"]:
        options["random_crop"] = True
    subsets = tuple(
        SubsetSettings(
            image_dir=str(pictures / name),
            num_repeats=choice["repeats"][number],
            is_reg=bool(number) and choice["is_reg"],
            caption_extension=".txt",
            caption_tag_dropout_rate=choice["drop"],
            token_warmup_step=choice["warm_up"],
            **options,
        )
        for number, name in enumerate(("one", "two"))
    )
    datasets = [
        DatasetSettings(
            resolution=(side, side), batch_size=choice["batch_size"], enable_bucket=choice["enable_bucket"],
            min_bucket_reso=16, max_bucket_reso=64, bucket_reso_steps=8, subsets=subsets,
        )
        for side in ((32, 24) if choice["two_sizes"] else (32,))
    ]  # fmt: skip
    return build_group(datasets, [scan(one) for one in datasets], tokenize=ByteTokens(), seed=7)


def load(group: DatasetGroup, plan: Any, **options: Any) -> list[Any]:
    return list(make_loader(group, plan, **options))


def uses(group: DatasetGroup) -> Counter:
    """Every use of a picture in an epoch: (data set, key) as often as it is repeated."""
    return Counter({(d.index, item.key): item.repeats for d in group.datasets for item in d.items})


def used(plan: Any, batches_of_ranks: list[list[Any]]) -> Counter:
    return Counter(
        (planned.dataset, key)
        for rank, batches in enumerate(batches_of_ranks)
        for planned, batch in zip(plan.batches[rank], batches, strict=True)
        for key in batch["image_keys"]
    )


def samples(plan: Any, group: DatasetGroup, rank: int, batches: list[Any]) -> dict[tuple, tuple]:
    """(data set, item, occurrence) -> what the step sees of it."""
    found = {}
    for planned, batch in zip(plan.batches[rank], batches, strict=True):
        for row, (item, occurrence) in enumerate(zip(planned.items, planned.occurrences, strict=True)):
            seen = (batch["images"][row], batch["captions"][row], batch["flippeds"][row], batch["loss_weights"][row])
            found[planned.dataset, item, occurrence] = seen
    return found


def equal_samples(first: tuple, second: tuple) -> bool:
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(first, second, strict=True))


@FEW
@given(choice=CHOICES, seed=st.integers(0, 99), epoch=st.integers(1, 3))
def test_every_use_once_an_epoch(pictures: Path, choice: dict[str, Any], seed: int, epoch: int) -> None:
    group = make(pictures, choice)
    plan = group.plan(seed, epoch)
    batches = load(group, plan)
    assert used(plan, [batches]) == uses(group)
    assert len(batches) == len(plan) == len(group)
    again = load(make(pictures, choice), plan)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


@FEW
@given(choice=CHOICES, seed=st.integers(0, 99), at=st.integers(0, 60))
def test_a_resume_gives_the_rest(pictures: Path, choice: dict[str, Any], seed: int, at: int) -> None:
    group = make(pictures, choice)
    plan = group.plan(seed, 2)
    start = min(at, len(plan))
    whole = load(group, plan, first_step=5)
    rest = load(make(pictures, choice), plan, start=start, first_step=5 + start)
    assert len(rest) == len(plan) - start
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@FEW
@given(choice=CHOICES, seed=st.integers(0, 99))
def test_two_processes_share_one_epoch(pictures: Path, choice: dict[str, Any], seed: int) -> None:
    choice = {**choice, "warm_up": 0}  # whose captions depend on the step
    group = make(pictures, choice)
    plan, alone = group.plan(seed, 1, processes=2), group.plan(seed, 1)
    ranks = [load(group, plan, rank=rank) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    expected, found = uses(group), used(plan, ranks)
    assert found.keys() == expected.keys()
    # a bucket with an odd rest gives one picture twice, so that no process waits
    assert all(0 <= found[key] - times <= 1 for key, times in expected.items())
    one = samples(alone, group, 0, load(group, alone))
    two = {key: value for rank in (0, 1) for key, value in samples(plan, group, rank, ranks[rank]).items()}
    assert one.keys() == two.keys()
    assert all(equal_samples(one[key], two[key]) for key in one)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("processes", [1, 2])
def test_workers_change_nothing(pictures: Path, processes: int) -> None:
    choice = {"batch_size": 3, "repeats": (2, 1), "is_reg": True, "enable_bucket": True, "drop": 0.4, "warm_up": 3,
              "options": {"flip_aug", "color_aug", "random_crop", "shuffle_caption"}, "two_sizes": True}  # fmt: skip
    group = make(pictures, choice)
    plan = group.plan(3, 1, processes=processes)
    for rank in range(processes):
        alone = load(group, plan, rank=rank)
        for workers in (1, 4):
            together = load(group, plan, rank=rank, workers=workers)
            assert all(same(a, b) for a, b in zip(alone, together, strict=True))
            rest = load(group, plan, rank=rank, workers=workers, start=2, first_step=2)
            assert all(same(a, b) for a, b in zip(alone[2:], rest, strict=True))
