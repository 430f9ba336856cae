"""Data sets of metadata files against the recorded cases of sd-scripts 0.7.0, and the forms that came later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.data.dataset import Dataset
from library.data.group import build_group
from library.data.latents_file import CachedLatents, Wanted, key_text, source_state, write_latents
from library.data.metadata_file import Entry, caption_of, read_entries
from library.data.records import DatasetSettings, ScanResult, SubsetSettings
from library.data.sources import scan
from library.messages import UserError
from tests.data.conftest import make_files

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "datasets_scan.json").read_text(encoding="utf-8"))["finetuning"]

# Recorded cases whose result differs here on purpose: number -> what this program gives.
FOUND_NOW = {4: "a key with its ending, relative to image_dir"}
FLIPPED_NOW = {13: "mirrored latents stand in the same file"}
REFUSED_NOW = {14: "latents in two files"}
REFUSALS = {
    5: "zzz .named in m.json, not found in d",
    6: "a .named in m.json, not found; give their folder",
    7: "m.json does not exist",
    14: "two files are an old format",
    20: "no training resolution",
}


def settings_of(case: dict) -> DatasetSettings:
    names = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    return DatasetSettings(
        kind="finetuning",
        resolution=tuple(case["resolution"]) if case["resolution"] else None,
        subsets=tuple(SubsetSettings(kind="finetuning", **subset) for subset in case["subsets"]),
        **{name: case[name] for name in names},
    )


def described(dataset: Dataset, found: ScanResult) -> dict:
    """The data set in the form of the record."""
    return {
        "records": [
            {
                "key": item.key,
                "path": item.path,
                "caption": item.caption,
                "repeats": item.repeats,
                "image_size": list(item.size),
                "bucket": list(item.bucket),
                "resized": list(item.resized),
                "npz": item.latents_npz,
            }
            for item in dataset.items
        ],
        "num_train_images": found.num_train_images,
        "tag_frequency": found.tag_frequency,
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": dataset.bucket_limits[0],
        "max_bucket_reso": dataset.bucket_limits[1],
        "bucket_reso_steps": None if dataset.bucket_limits[0] is None else dataset.settings.bucket_reso_steps,
        "buckets": [list(size) for size in dataset.buckets.sizes],
        "length": len(dataset),
    }


def with_new_behaviour(number: int, case: dict) -> dict:
    """The recorded result, changed where this program mends a fault of the original."""
    result = json.loads(json.dumps(case["result"]))
    records = {record["key"]: record for record in result["records"]}
    if number == 0:  # tags count where there is no caption too
        result["tag_frequency"]["m.json"] |= {"x": 1, "y": 1}
    if number == 1:  # no separator before the only part
        records["b"]["caption"] = "t"
    if number == 2:  # line breaks are blanks: the same tokens, and captions are one line everywhere
        records["d/b.jpg"]["caption"] = "line1 line2"
    if number in FLIPPED_NOW:
        for key in records:
            records[key]["npz"] = f"d/{key}.npz"
    if number == 8:  # the limits of buckets that no picture needs
        result |= {"min_bucket_reso": 64, "max_bucket_reso": 256, "bucket_reso_steps": 64}
    if number == 21:  # equal keys of two metadata files are two pictures
        result["records"] = [
            {
                "key": "a",
                "path": "d/a.png",
                "caption": "one",
                "repeats": 2,
                "image_size": [200, 100],
                "bucket": [128, 128],
                "resized": [256, 128],
                "npz": None,
            },
            {**result["records"][0], "key": "n.json: a"},
        ]
        result["length"] = 3
    for record in result["records"]:  # pictures from files are covered and cut, never squeezed into their bucket
        size = case["files"].get(record["path"])
        if record["npz"] is None and size and record["image_size"] != size:
            record["image_size"] = size
            scale = max(b / s for b, s in zip(record["bucket"], size, strict=True))
            record["resized"] = [int(side * scale + 0.5) for side in size]
    return result


@pytest.mark.parametrize("number", range(len(CASES)))
def test_recorded_cases(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[number]
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, case["files"])
    settings = settings_of(case)
    if number in REFUSALS:
        assert "error" in case["result"] or number in REFUSED_NOW
        with pytest.raises(UserError, match=REFUSALS[number]):
            scan(settings)
        return
    found = scan(settings)
    dataset = build_group([settings], [found], tokenize=None, seed=0).datasets[0]
    if number in FOUND_NOW:
        assert [item.path for item in dataset.items] == ["d/a.png"]
        return
    assert described(dataset, found) == with_new_behaviour(number, case)


def test_the_exceptions_are_real() -> None:
    assert {n for n, case in enumerate(CASES) if "error" in case["result"]} == set(REFUSALS) - set(REFUSED_NOW) | set(
        FOUND_NOW
    )
    assert CASES[13]["result"]["records"][0]["npz"] is None and CASES[14]["result"]["records"][0]["npz"]


def fine_tuning(tmp_path: Path, files: dict, name: str = "m.json", **values: object) -> tuple[Dataset, ScanResult]:
    make_files(tmp_path, files)
    own = {key: values.pop(key) for key in list(values) if key in SubsetSettings.__dataclass_fields__}
    folder = str(tmp_path / "d") if (tmp_path / "d").is_dir() else None
    subset = SubsetSettings(kind="finetuning", image_dir=folder, metadata_file=str(tmp_path / name), **own)
    values = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, "resolution": (128, 128), **values}
    settings = DatasetSettings(kind="finetuning", subsets=(subset,), **values)
    found = scan(settings)
    return build_group([settings], [found], tokenize=None, seed=1).datasets[0], found


def test_lines_of_json_with_sizes(tmp_path: Path) -> None:
    lines = [
        {"image_path": "a.png", "caption": "x", "tags": "t", "image_size": [200, 100]},
        {"file_name": "b.png", "caption": "y"},
    ]
    files = {"d/a.png": [200, 100], "d/b.png": [64, 64], "m.jsonl": "\n".join(map(json.dumps, lines)) + "\n\n"}
    dataset, _ = fine_tuning(tmp_path, files, "m.jsonl")
    assert [(item.caption, item.size, item.bucket) for item in dataset.items] == [
        ("x, t", (200, 100), (128, 128)),
        ("y", (64, 64), (128, 128)),
    ]
    assert [Path(item.path).name for item in dataset.items] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.json", "[1]", "holds no object"),
        ("m.json", "{", "no valid JSON"),
        ("m.json", '{"a": 1}', "entry of a is no object"),
        ("m.json", '{"a": {"caption": 3}}', "caption of a is a number"),
        ("m.json", '{"a": {"tags": {}}}', "tags of a is an object"),
        ("m.json", '{"a": {"train_resolution": [64]}}', "train_resolution of a is"),
        ("m.json", '{"a": {"train_resolution": [64, -64]}}', "must be .width, height"),
        ("m.jsonl", '{"image_path": "a"}\n{', "line 2 is no valid JSON"),
        ("m.jsonl", '{"caption": "a"}', "line 1 names no picture"),
        ("m.jsonl", "[]", "line 1 names no picture"),
    ],
)
def test_metadata_of_another_form_are_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        read_entries(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "settings", "caption"),
    [
        ({"caption": "a\nb", "tags": "x, y"}, {}, "a b, x, y"),
        ({"caption": "a\nb", "tags": "x\ny"}, {"enable_wildcard": True}, "a,x,y\nb,x,y"),
        ({"caption": "", "tags": "x\ny"}, {"enable_wildcard": True}, "x,y"),
        ({"caption": " a \n\n b"}, {"enable_wildcard": True}, "a\nb"),
        ({"caption": "a", "tags": "x"}, {"caption_separator": ";"}, "a; x"),
        ({"caption": "a\nb", "tags": "x", "several": True}, {}, "a, x"),
        ({"caption": "a\nb", "several": True}, {"enable_wildcard": True}, "a\nb"),
        ({}, {}, ""),
    ],
)
def test_captions_of_entries(entry: dict, settings: dict, caption: str) -> None:
    assert caption_of(Entry("k", **entry), SubsetSettings(**settings)) == caption


def test_several_captions_of_a_picture(tmp_path: Path) -> None:
    files = {"d/a.png": [64, 64], "m.json": {"a": {"caption": ["one", "two\nlines"], "tags": ["s", "t"]}}}
    dataset, found = fine_tuning(tmp_path, files)
    assert dataset.items[0].caption == "one, s, t"
    assert any("enable_wildcard" in note for note in found.notes)
    dataset, found = fine_tuning(tmp_path, files, enable_wildcard=True)
    assert dataset.items[0].caption == "one,s, t\ntwo lines,s, t"
    assert not any("enable_wildcard" in note for note in found.notes)


def test_precomputed_latents_are_what_is_trained_on(tmp_path: Path) -> None:
    arrays = ["latents", "latents_flipped"]
    files = {"d/a.npz": ["npz", 64, 128, arrays], "m.json": {"a": {"caption": "x", "train_resolution": [64, 128]}}}
    dataset, found = fine_tuning(tmp_path, files, resolution=None, enable_bucket=False, flip_aug=True, num_repeats=4)
    assert dataset.enable_bucket and any("buckets are on" in note for note in found.notes)
    batch = dataset[0]
    assert batch["images"] is None
    assert torch.equal(batch["latents"], torch.full((1, 4, 16, 8), 2.0))
    assert batch["original_sizes_hw"].tolist() == [[128, 64]]


@pytest.mark.parametrize(
    ("npz", "words"),
    [
        (["npz", 64, 64, ["latents"]], "not of the training size 64x128"),
        (["npz", 64, 128, []], "older format"),
        ("broken", "broken or of an older format"),
    ],
)
def test_latents_that_do_not_fit_are_not_used(npz: object, words: str, tmp_path: Path) -> None:
    files = {"d/a.npz": npz, "m.json": {"a": {"train_resolution": [64, 128]}}}
    with pytest.raises(UserError, match="no picture, and its latents") as error:
        fine_tuning(tmp_path, files)
    assert words in str(error.value)
    dataset, found = fine_tuning(tmp_path, {**files, "d/a.png": [70, 150]})
    assert dataset.items[0].latents_npz is None and dataset.items[0].resized == (64, 137)
    assert any("precomputed latents are not used" in note and words in note for note in found.notes)
    assert dataset[0]["images"].shape == (1, 3, 128, 64)


def test_an_alpha_mask_that_the_latents_lack_needs_the_picture(tmp_path: Path) -> None:
    files = {
        "d/a.png": [64, 128],
        "d/a.npz": ["npz", 64, 128, ["latents"]],
        "m.json": {"a": {"train_resolution": [64, 128]}},
    }
    dataset, found = fine_tuning(tmp_path, files, alpha_mask=True)
    assert dataset.items[0].latents_npz is None and any("no alpha mask" in note for note in found.notes)


def test_latents_of_a_picture_that_changed_are_not_used(tmp_path: Path) -> None:
    files = {"d/a.png": [64, 128], "m.json": {"a": {"train_resolution": [64, 128]}}}
    make_files(tmp_path, files)
    picture, npz = tmp_path / "d" / "a.png", tmp_path / "d" / "a.npz"
    entry = CachedLatents(torch.zeros(4, 16, 8), (64, 128), (0, 0, 64, 128))
    wanted = Wanted(str(picture), (64, 128), (64, 128))
    write_latents(npz, entry, key_text(wanted, source_state(picture)))
    dataset, _ = fine_tuning(tmp_path, {"m.json": files["m.json"]})
    assert dataset.items[0].latents_npz == str(npz)
    picture.write_bytes(picture.read_bytes() + b"more")
    dataset, found = fine_tuning(tmp_path, {"m.json": files["m.json"]})
    assert dataset.items[0].latents_npz is None
    assert any("is older than its picture (picture changed)" in note for note in found.notes)


def test_bucket_steps_are_checked_on_the_sizes_of_the_metadata(tmp_path: Path) -> None:
    files = {"d/a.png": [64, 128], "m.json": {"a": {"train_resolution": [72, 128]}}}
    dataset, _ = fine_tuning(tmp_path, files)
    dataset.verify_bucket_reso_steps(8)
    with pytest.raises(UserError, match="72x128"):
        dataset.verify_bucket_reso_steps(64)


def test_own_buckets_and_no_upscaling_contradict_each_other(tmp_path: Path) -> None:
    files = {"d/a.png": [64, 128], "m.json": {"a": {"train_resolution": [64, 128]}}}
    with pytest.raises(UserError, match="bucket_no_upscale"):
        fine_tuning(tmp_path, files, bucket_no_upscale=True)


def test_unreadable_and_missing_pictures_are_named_or_left_out(tmp_path: Path) -> None:
    files = {
        "d/a.png": [64, 64],
        "d/b.png": "no picture",
        "m.json": {key: {"caption": key} for key in ("a", "b", "c")},
    }
    with pytest.raises(UserError, match=r"b\.png \(not a readable picture") as error:
        fine_tuning(tmp_path, files)
    assert "c (named in" in str(error.value)
    settings = DatasetSettings(
        kind="finetuning",
        resolution=(64, 64),
        subsets=(SubsetSettings(image_dir=str(tmp_path / "d"), metadata_file=str(tmp_path / "m.json")),),
    )
    found = scan(settings, skip_broken=True)
    assert [item.key for item in found.items] == ["a"]
    assert any("2 pictures are left out" in note for note in found.notes)


@pytest.mark.parametrize(("given", "right"), [("d", "d/sub"), ("d/sub/low", "d/sub")])
def test_the_folder_one_level_up_or_down_is_named(given: str, right: str, tmp_path: Path) -> None:
    make_files(tmp_path, {"d/sub/a.png": [8, 8], "d/sub/low/z.png": [8, 8], "m.json": {"a": {}}})
    subset = SubsetSettings(image_dir=str(tmp_path / given), metadata_file=str(tmp_path / "m.json"))
    with pytest.raises(UserError, match=r"no picture of .* is in") as error:
        scan(DatasetSettings(kind="finetuning", resolution=(64, 64), subsets=(subset,)))
    assert f"give {tmp_path / right} as image_dir" in str(error.value)


def test_a_missing_image_folder_is_named(tmp_path: Path) -> None:
    make_files(tmp_path, {"m.json": {"a": {}}})
    subset = SubsetSettings(image_dir=str(tmp_path / "gone"), metadata_file=str(tmp_path / "m.json"))
    with pytest.raises(UserError, match="gone does not exist"):
        scan(DatasetSettings(kind="finetuning", resolution=(64, 64), subsets=(subset,)))


def test_pictures_of_metadata_can_be_held_out(tmp_path: Path) -> None:
    entries = {str(i): {"train_resolution": [64, 128]} for i in range(4)}
    files = {f"d/{i}.png": [64, 128] for i in range(4)} | {"m.json": entries}
    make_files(tmp_path, files)
    subset = SubsetSettings(image_dir=str(tmp_path / "d"), metadata_file=str(tmp_path / "m.json"))
    settings = DatasetSettings(kind="finetuning", validation_split=0.25, subsets=(subset,))
    group = build_group([settings], [scan(settings)], tokenize=None, seed=1)
    assert [len(part.datasets[0].items) for part in (group, group.validation)] == [3, 1]
    assert group.validation.datasets[0].buckets.sizes == [(64, 128)]
