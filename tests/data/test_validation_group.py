"""Held-out pictures: a group of their own, each picture once, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.data.group import build_group
from library.data.records import DatasetSettings, Item, ScanResult, SubsetSettings
from library.data.sources import scan
from library.data.validation import hold_out, trained_too
from library.messages import UserError
from tests.data.conftest import ByteTokens, same

CHANCE = {
    "flip_aug": True,
    "color_aug": True,
    "random_crop": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.5,
    "caption_tag_dropout_rate": 0.5,
    "token_warmup_step": 100,
    "enable_wildcard": True,
}


def items(count: int) -> list[Item]:
    return [Item(str(i), f"{i:03}", "", (8, 8), repeats=3) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "share", "held_out"), [(10, 0.25, 2), (10, 0.35, 4), (4, 0.2, 1), (3, 0.1, 0), (5, 1, 5)]
)
def test_no_picture_is_in_both_parts(count: int, share: float, held_out: int) -> None:
    settings = DatasetSettings(validation_split=share, validation_seed=3)
    train, rest = hold_out(items(count), settings, 0)
    assert sorted(item.key for item in [*train, *rest]) == sorted(str(i) for i in range(count))
    assert len(rest) == held_out and {item.repeats for item in rest} <= {1}
    assert {item.repeats for item in train} <= {3}


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        hold_out(items(2), DatasetSettings(validation_split=1.5), 0)


def test_the_validation_group_holds_each_picture_once_and_never_changes(shapes: Path, make_group) -> None:
    group = make_group(shapes, validation_split=0.5, validation_seed=1, caption_prefix="p", **CHANCE)
    held_out = group.validation
    keys = {item.key for dataset in held_out.datasets for item in dataset.items}
    assert len(keys) == 3 and not keys & {item.key for item in group.datasets[0].items}
    plan = held_out.plan(7, 1)
    first = [held_out.batch(planned, epoch=1, step=0) for planned in plan.batches[0]]
    later = [held_out.batch(planned, epoch=5, step=900) for planned in plan.batches[0]]
    assert sorted(key for batch in first for key in batch["image_keys"]) == sorted(keys)
    assert all(same(a, b) for a, b in zip(first, later, strict=True))
    raw = {item.key: f"p {item.caption}" for item in held_out.datasets[0].items}
    for batch in first:
        assert batch["captions"] == [raw[key] for key in batch["image_keys"]]
        assert not any(batch["flippeds"])
    assert group.with_validation == [*group.datasets, *held_out.datasets]


def test_without_a_share_there_is_no_validation_group(shapes: Path, make_group) -> None:
    group = make_group(shapes)
    assert group.validation is None and group.with_validation == group.datasets


def test_a_whole_data_set_for_validation(shapes: Path) -> None:
    subset = SubsetSettings(image_dir=str(shapes), caption_extension=".txt", num_repeats=4)
    common = {"resolution": (128, 128), "enable_bucket": True, "min_bucket_reso": 64, "subsets": (subset,)}
    settings = [DatasetSettings(**common), DatasetSettings(**common, is_validation=True, validation_split=0.5)]
    scans = [scan(one) for one in settings]
    assert [len(result.items) for result in scans] == [6, 0]
    group = build_group(settings, scans, tokenize=ByteTokens(), seed=1)
    assert len(group.datasets) == len(group.validation.datasets) == 1
    assert group.validation.num_train_images == 6 and group.num_train_images == 24
    assert group.validation.datasets[0].image_counts == [6]


def test_held_out_pictures_that_are_trained_on_are_found(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shapes)
    common = {"resolution": (128, 128), "enable_bucket": True, "min_bucket_reso": 64}
    settings = [
        DatasetSettings(**common, subsets=(SubsetSettings(image_dir=str(shapes)),), validation_split=0.5),
        DatasetSettings(**common, subsets=(SubsetSettings(image_dir=str(tmp_path / "link")),), is_validation=True),
    ]
    scans = [scan(one) for one in settings]
    assert trained_too(scans[:1]) == trained_too(scans[1:]) == []
    assert [Path(path).name for path in trained_too(scans)] == [Path(item.path).name for item in scans[0].items]


def test_replacements_reach_the_validation_captions(shapes: Path, make_group) -> None:
    group = make_group(shapes, validation_split=0.5)
    group.add_replacement("", ["a photo of zqx"])
    batch = group.validation.batch(group.validation.plan(7, 1).batches[0][0], epoch=1, step=0)
    assert set(batch["captions"]) == {"a photo of zqx"}


def test_scans_without_held_out_pictures_make_no_data_set() -> None:
    settings = [DatasetSettings(resolution=(64, 64), is_validation=True)]
    assert build_group(settings, [ScanResult()], tokenize=None, seed=0).validation is None
