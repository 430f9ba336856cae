"""Folder scans against the recorded cases of sd-scripts 0.7.0, and what they say about odd folders."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from library.data import listing, picture_folder, sources
from library.data.buckets import bucket_rule, sort_into_buckets
from library.data.records import DatasetSettings, Item, SubsetSettings
from library.messages import UserError
from tests.data.conftest import make_files

GOLDEN = Path(__file__).parents[1] / "golden"
SCANS = json.loads((GOLDEN / "datasets_scan.json").read_text(encoding="utf-8"))
REPEATS = json.loads((GOLDEN / "datasets_repeats.json").read_text(encoding="utf-8"))["cases"]


def settings_of(*subsets: dict, **values: object) -> DatasetSettings:
    return DatasetSettings(resolution=(64, 64), subsets=tuple(SubsetSettings(**s) for s in subsets), **values)


def with_new_behaviour(case: dict) -> dict:
    """The recorded result, changed where this program mends a fault of the original."""
    result = json.loads(json.dumps(case["result"]))
    records = result.get("records", [])
    if "d/f.Png" in case["files"]:  # endings count in any case of letters
        caption = case["subsets"][0].get("class_tokens", "")
        repeats = case["subsets"][0].get("num_repeats", 1)
        records.append({"key": "d/f.Png", "caption": caption, "repeats": repeats, "is_reg": False})
        result["num_train_images"] += repeats
        if caption:
            result["tag_frequency"]["d"][caption] += 1
        result["subsets_kept"][0]["img_count"] += 1
    if "d_x_y_z_w/p.png" in case["files"]:  # underscores of folders do not state a face
        records[0]["caption"] = ""
        result["tag_frequency"]["d_x_y_z_w"] = {}
    if {"image_dir": "d/", "class_tokens": "slash"} in case["subsets"]:  # `d/` is the folder `d`
        records[0]["caption"] = "t"
        result["num_train_images"] = 1
        result["tag_frequency"] = {"d": {"t": 1}, "r": {"reg": 1}}
        result["subsets_kept"] = [{"image_dir": "d", "img_count": 1}, {"image_dir": "r", "img_count": 1}]
        records[1]["repeats"] = 2
    return result


@pytest.mark.parametrize("number", range(len(SCANS["dreambooth"])))
def test_scan_cases(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SCANS["dreambooth"][number]
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, case["files"])
    settings = settings_of(*case["subsets"])
    if "error" in case["result"]:
        with pytest.raises(UserError, match=r"d/a\.txt"):
            sources.scan(settings)
        return
    found = sources.scan(settings)
    kept = [
        {"image_dir": subset.image_dir, "img_count": count}
        for subset, count in zip(settings.subsets, found.image_counts, strict=True)
        if count
    ]
    assert {
        "records": [
            {"key": item.key, "caption": item.caption, "repeats": item.repeats, "is_reg": item.is_reg}
            for item in found.items
        ],
        "num_train_images": found.num_train_images,
        "num_reg_images": found.num_reg_images,
        "tag_frequency": found.tag_frequency,
        "subsets_kept": kept,
    } == with_new_behaviour(case)
    assert all(item.size == (64, 64) and item.path == item.key for item in found.items)


def test_every_recorded_kind_of_scan_has_a_test() -> None:
    assert set(SCANS) == {"about", "dreambooth", "finetuning", "controlnet"}


@pytest.mark.parametrize("number", range(len(REPEATS)))
def test_repeats_and_buckets(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = REPEATS[number]
    monkeypatch.chdir(tmp_path)
    groups = {f"t{i}": group for i, group in enumerate(case["train"])}
    groups |= {f"r{i}": group for i, group in enumerate(case["reg"])}
    for name, group in groups.items():
        (tmp_path / name).mkdir()
        for index in range(group["images"]):
            size = case["image_sizes_cycled"][index % len(case["image_sizes_cycled"])]
            Image.new("1", tuple(size)).save(tmp_path / name / f"{index:03}.png")
    subsets = [
        {"image_dir": name, "num_repeats": groups[name]["repeats"], "is_reg": name.startswith("r"), "class_tokens": "x"}
        for name in case["subset_order"]
    ]
    found = sources.scan(settings_of(*subsets))
    assert [item.key for item in found.items] == case["registered_order"]
    assert {item.key: item.repeats for item in found.items} == case["registered"]
    assert (found.num_train_images, found.num_reg_images) == (case["num_train_images"], case["num_reg_images"])
    assert any("are not used" in note for note in found.notes) == case["warns_some_reg_unused"]
    # The original gives regularisation pictures the settings of the last subset; here each keeps its own.
    assert all(subsets[item.subset]["image_dir"] == item.key.split("/")[0] for item in found.items)

    rule = bucket_rule((64, 64), enable=True, smallest=32, largest=128, step=8)
    buckets = sort_into_buckets([rule.fit(item.size) for item in found.items], [item.repeats for item in found.items])
    made = [
        {"resolution": list(size), "count": len(members), "batches": -(-len(members) // case["batch_size"])}
        for size, members in zip(buckets.sizes, buckets.members, strict=True)
    ]
    assert made == case["buckets"]
    assert buckets.batch_count(case["batch_size"]) == case["dataset_length"]


def test_captions_with_byte_order_marks_and_windows_line_ends(tmp_path: Path) -> None:
    texts = {"a": "größe\r\nmore".encode("utf-8-sig"), "b": "größe".encode("utf-16"), "c": "größe\rmore".encode()}
    for name, data in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
        assert picture_folder.read_caption(tmp_path / f"{name}.txt") == "größe"


def test_wildcard_captions_keep_every_line(tmp_path: Path) -> None:
    make_files(tmp_path, {"d/a.png": [8, 8], "d/a.txt": " one \n\n two\n"})
    subset = {"image_dir": str(tmp_path / "d"), "caption_extension": "txt", "enable_wildcard": True}
    assert sources.scan(settings_of(subset)).items[0].caption == "one\ntwo"


def test_unreadable_files_are_named_together(tmp_path: Path) -> None:
    make_files(tmp_path, {"d/a.png": [8, 8], "d/b.png": "no picture", "d/c.png": [8, 8], "d/c.txt": ""})
    (tmp_path / "d" / "e.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(UserError) as error:
        sources.scan(settings_of({"image_dir": str(tmp_path / "d"), "caption_extension": ".txt"}))
    for name in ("b.png (not a readable picture)", "c.txt (an empty caption file)", "e.jpg"):
        assert sum(name in line for line in error.value.details) == 1
    assert len(error.value.details) == 3 and error.value.problem == "cannot read 3 files"


def test_notes_name_what_was_probably_meant(tmp_path: Path) -> None:
    make_files(
        tmp_path,
        {"d/a.png": [8, 8], "d/a.txt": "x", "d/b.gif": [8, 8], "up/down/a.png": [64, 64]},
    )
    up = str(tmp_path / "up")
    notes = "\n".join(
        sources.scan(settings_of({"image_dir": str(tmp_path / "d")}, {"image_dir": up}, {"image_dir": "gone"})).notes
    )
    assert "1 pictures have no .caption file (a.png), their caption is empty" in notes
    assert "is caption_extension .txt meant?" in notes
    assert "1 .gif files are not read" in notes
    assert f"{up} holds no pictures, but {Path(up) / 'down'} does" in notes
    assert "gone is left out: it does not exist" in notes
    assert "1 pictures are enlarged more than twice" in notes


def test_no_pictures_at_all_is_refused_with_the_folders(tmp_path: Path) -> None:
    settings = settings_of({"image_dir": str(tmp_path)})
    found = sources.scan(settings)
    with pytest.raises(UserError, match="no pictures found in") as error:
        sources.require_pictures([settings], [found])
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("values", "words"), [({"batch_size": 0}, "batch_size"), ({"validation_split": 2}, "split")])
def test_settings_out_of_range_are_refused(values: dict, words: str, tmp_path: Path) -> None:
    make_files(tmp_path, {"d/a.png": [8, 8]})
    with pytest.raises(UserError, match=words):
        sources.scan(settings_of({"image_dir": str(tmp_path / "d")}, **values))


def test_small_pictures_are_left_out_on_demand(tmp_path: Path) -> None:
    make_files(tmp_path, {"d/a.png": [10, 10], "d/b.png": [20, 5], "d/c.png": [11, 10]})
    found = sources.scan(settings_of({"image_dir": str(tmp_path / "d")}, skip_image_resolution=(10, 10)))
    assert [Path(item.key).name for item in found.items] == ["c.png"]
    assert found.image_counts == [1]
    assert any("2 pictures of at most 10x10 are left out" in note for note in found.notes)


def test_pictures_for_validation_alone_are_not_trained_on(tmp_path: Path) -> None:
    make_files(tmp_path, {"d/a.png": [8, 8], "r/a.png": [8, 8]})
    subsets = [{"image_dir": str(tmp_path / "d"), "num_repeats": 3}, {"image_dir": str(tmp_path / "r"), "is_reg": True}]
    settings = settings_of(*subsets, is_validation=True)
    found = sources.scan(settings)
    assert (found.items, len(found.validation), found.num_train_images) == ([], 1, 0)
    assert any("regularisation pictures are not for validation" in note for note in found.notes)
    with pytest.raises(UserError, match="held out for validation"):
        sources.require_pictures([settings], [found])


def test_links_and_unicode_names_are_followed(tmp_path: Path) -> None:
    make_files(tmp_path, {"real/ä 日本.png": [8, 9], "real/ä 日本.txt": "x"})
    (tmp_path / "d").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real" / "b.png").symlink_to(tmp_path / "real" / "ä 日本.png")
    found = sources.scan(settings_of({"image_dir": str(tmp_path / "d"), "caption_extension": ".txt"}))
    assert [(Path(item.key).name, item.size) for item in found.items] == [("b.png", (8, 9)), ("ä 日本.png", (8, 9))]
    assert found.items[1].caption == "x"


def test_cache_info_is_written_and_read_again(tmp_path: Path) -> None:
    make_files(tmp_path, {"d/a.png": [8, 9], "d/a.txt": "x", "d/b.png": [7, 8]})
    subset = {"image_dir": str(tmp_path / "d"), "caption_extension": ".txt", "class_tokens": "t", "cache_info": True}
    first = sources.scan(settings_of(subset))
    path = tmp_path / "d" / "metadata_cache.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        str(tmp_path / "d" / "a.png"): {"caption": "x", "resolution": [8, 9], "orientation": 1},
        str(tmp_path / "d" / "b.png"): {"caption": "t", "resolution": [7, 8], "orientation": 1},
    }
    (tmp_path / "d" / "a.txt").write_text("changed")
    again = sources.scan(settings_of(subset))
    assert again.items == first.items
    assert any("metadata_cache.json" in note for note in again.notes)
    path.write_text("broken")
    assert sources.scan(settings_of(subset)).items[0].caption == "changed"


def test_validation_pictures_are_held_out_of_training(tmp_path: Path) -> None:
    make_files(tmp_path, {f"{folder}/{i}.png": [8, 8] for folder in ("d", "r") for i in range(10)})
    subsets = [{"image_dir": str(tmp_path / "d"), "num_repeats": 3}, {"image_dir": str(tmp_path / "r"), "is_reg": True}]
    values = {"validation_split": 0.25, "validation_seed": 7}
    found = sources.scan(settings_of(*subsets, **values))
    order = list(range(10))
    random.Random(7).shuffle(order)
    assert [Path(item.key).stem for item in found.validation] == [str(i) for i in sorted(order[8:])]
    assert [Path(item.key).stem for item in found.items if not item.is_reg] == [str(i) for i in sorted(order[:8])]
    assert {item.repeats for item in found.validation} == {1}
    assert found.num_train_images == 24
    assert found.image_counts == [8, 10]
    assert "2 pictures are held out for validation" in found.notes
    unseeded = settings_of(*subsets, validation_split=0.25)
    held_out = [[item.key for item in sources.scan(unseeded, seed=seed).validation] for seed in (1, 1, 2)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_slow_files_are_read_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SLOW_FILE_SECONDS", 0)
    assert listing.map_files(lambda number: number * 2, range(100)) == [number * 2 for number in range(100)]


def test_balance_uses_nothing_without_training_pictures() -> None:
    assert sources.balance([Item("a", "a", "", (1, 1))], 0) == []
    assert sources.balance([], 5) == []


@pytest.mark.parametrize(
    ("subset", "values", "says"),
    [
        ({}, {"resolution": (0, 64)}, "resolution is 0x64: its sides must lie between 1 and 65535"),
        ({}, {"resolution": (64, 70000)}, "resolution is 64x70000"),
        ({"num_repeats": 10**7}, {}, "num_repeats of d is 10000000: give 1000000 at most"),
        ({"caption_separator": ""}, {}, "caption_separator is empty"),
        ({"face_crop_aug_range": (0.0, 1.0)}, {}, r"face_crop_aug_range is 0.0,1.0: give two numbers above 0"),
    ],
)
def test_settings_that_no_batch_can_be_made_of(subset: dict, values: dict, says: str) -> None:
    settings = DatasetSettings(**{"resolution": (64, 64), **values}, subsets=(SubsetSettings(image_dir="d", **subset),))
    with pytest.raises(UserError, match=says):
        sources.scan(settings)
