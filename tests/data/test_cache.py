"""Latent caches: the original's files, what is kept and what is made anew, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.cache import cache_latents
from library.data.cache_tasks import collect_tasks, encoding_batches
from library.data.classic import (
    is_disk_cached_latents_is_expected,
    load_latents_from_disk,
    save_latents_to_disk,
)
from library.data.group import build_group
from library.data.latents_file import fingerprint, read_header, read_latents
from library.data.loader import make_loader
from library.data.records import DatasetSettings, Item, ScanResult, SubsetSettings
from library.messages import UserError
from tests.data.conftest import ByteTokens, block_means, same, side_by_side

ELSEWHERE = {"text_encoder_outputs"}  # test_text_cache.py


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "datasets_npz.json").read_text(encoding="utf-8"))


class Counting:
    """`block_means` that counts pictures and remembers call shapes."""

    def __init__(self, dtype=torch.float32):
        self.calls = []
        self.dtype = dtype

    def __call__(self, pictures):
        self.calls.append(list(pictures.shape))
        return block_means(pictures).to(self.dtype)

    @property
    def pictures(self):
        return sum(shape[0] for shape in self.calls)


def gradient(path, size):
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    picture = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)], 2)
    Image.fromarray(picture.astype(np.uint8)).save(path)


def one_picture(folder, case):
    path = folder / case["image"]
    gradient(path, case["image_size"])
    settings = dict(case["settings"])
    subset = SubsetSettings(flip_aug=settings.pop("flip_aug"))
    resolved = DatasetSettings(resolution=tuple(case["resolution"]), enable_bucket=True, subsets=(subset,), **settings)
    scan = ScanResult(items=[Item(str(path), str(path), "c", tuple(case["image_size"]))])
    return build_group([resolved], [scan], tokenize=ByteTokens(), seed=1)


def cache(group, encode=None, **options):
    encode = encode or Counting()
    return encode, cache_latents(group.datasets, encode, to_disk=True, **options)


def described(batch):
    def one(value):
        if torch.is_tensor(value):
            return {"shape": list(value.shape), "dtype": str(value.dtype)}
        return None if value is None else "list"

    return {name: one(value) for name, value in batch.items()}


def test_golden_sections_are_all_known(recorded):
    assert set(recorded) == {
        *("about", "example_files", "latents_on_disk", "latents_in_memory", "latent_batches"),
        *ELSEWHERE,
    }


def test_files_equal_the_original(recorded, tmp_path, golden):
    for number, case in enumerate(recorded["latents_on_disk"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        group = one_picture(folder, case)
        encode, _ = cache(group, Counting(getattr(torch, case["vae_dtype"])))
        assert sorted(os.listdir(folder)) == case["files"]
        assert encode.calls == case["vae_calls"]
        with np.load(folder / "pic.v1.npz") as file:
            arrays = {name: file[name] for name in file.files}
        assert [*case["array_order"], "cache_key"] == list(arrays)
        for name, told in case["arrays"].items():
            assert {"shape": list(arrays[name].shape), "dtype": str(arrays[name].dtype)} == told, (number, name)
        assert arrays["original_size"].tolist() == case["original_size"]
        assert arrays["crop_ltrb"].tolist() == pytest.approx(case["crop_ltrb"], rel=1e-9)
        item = group.datasets[0].items[0]
        assert [list(item.bucket), list(item.resized)] == [case["bucket"], case["resized"]]
        example = described(next(make_loader(group, group.plan(1, 1))))
        assert {name: example[name] for name in case["example"]} == case["example"]
        if number < 2:
            name = "datasets_latents_noflip.npz" if number == 0 else "datasets_latents_flip.npz"
            with np.load(golden / name) as file:
                for array in file.files:
                    tolerance = 1e-5 if number == 0 else 1e-2
                    np.testing.assert_allclose(arrays[array], file[array], atol=tolerance)


def test_size_numbers_of_cached_batches(recorded, tmp_path):
    for number, case in enumerate(recorded["latents_on_disk"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        group = one_picture(folder, case)
        cache(group)
        for epoch in range(1, 30):
            batch = next(make_loader(group, group.plan(1, epoch)))
            if batch["flippeds"] == [False]:
                break
        told = {
            name: batch[name].tolist() if torch.is_tensor(batch[name]) else batch[name]
            for name in case["example_values"]
        }
        assert told == case["example_values"]


def test_our_files_are_valid_by_the_original_rules(recorded, tmp_path):
    for number, case in enumerate(recorded["latents_on_disk"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        cache(one_picture(folder, case))
        path, bucket, flip = folder / "pic.v1.npz", tuple(case["bucket"]), case["settings"]["flip_aug"]
        other = (bucket[0] + 64, bucket[1])
        answers = {
            "same": is_disk_cached_latents_is_expected(bucket, path, flip),
            "with_flip": is_disk_cached_latents_is_expected(bucket, path, True),
            "without_flip": is_disk_cached_latents_is_expected(bucket, path, False),
            "other_size": is_disk_cached_latents_is_expected(other, path, flip),
            "missing": is_disk_cached_latents_is_expected(bucket, folder / "absent.npz", flip),
        }
        assert answers == case["expected_check"]


@pytest.mark.parametrize("number", [0, 1])
def test_files_of_the_original_are_used(recorded, tmp_path, golden, number):
    case = recorded["latents_on_disk"][number]
    group = one_picture(tmp_path, case)
    original = golden / ("datasets_latents_flip.npz" if number else "datasets_latents_noflip.npz")
    (tmp_path / "pic.v1.npz").write_bytes(original.read_bytes())
    encode, report = cache(group, vae="any", dtype="float16")
    assert encode.calls == [] and report.kept == 1
    batch = next(make_loader(group, group.plan(1, 1)))
    with np.load(original) as file:
        expected = file["latents_flipped" if batch["flippeds"][0] else "latents"]
    assert np.array_equal(batch["latents"][0].numpy(), expected)
    assert (tmp_path / "pic.v1.npz").read_bytes() == original.read_bytes()


def test_latents_in_memory(recorded, tmp_path):
    told = recorded["latents_in_memory"]
    group = one_picture(tmp_path, recorded["latents_on_disk"][1])
    cache_latents(group.datasets, Counting(torch.float16))
    entry = group.datasets[0].memory_latents[0]
    for name, tensor in (("latents", entry.latents), ("latents_flipped", entry.flipped)):
        assert {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} == told[name]
    assert list(entry.original) == told["original_size"] and list(entry.ltrb) == told["crop_ltrb"]
    assert os.listdir(tmp_path) == told["files"]


def test_batches_hold_at_least_what_the_original_puts_together(recorded, tmp_path):
    """The original went by area alone, so that 192x64 and 64x192 in turn made batches of one."""
    for case in recorded["latent_batches"]:
        sizes = {name: tuple(bucket) for name, bucket in case["buckets"].items()}
        settings = DatasetSettings(
            resolution=(128, 128),
            enable_bucket=True,
            min_bucket_reso=64,
            max_bucket_reso=256,
            subsets=(SubsetSettings(),),
        )
        items = [Item(name, str(tmp_path / name), "", size) for name, size in sorted(sizes.items())]
        group = build_group([settings], [ScanResult(items=items)], tokenize=None, seed=0)
        assert {item.key: item.bucket for item in group.datasets[0].items} == sizes
        tasks = [task for same_stem in collect_tasks(group.datasets) for task in same_stem]
        made = [
            [Path(task.wanted.source).name for task in batch]
            for batch in encoding_batches(tasks, case["vae_batch_size"])
        ]
        assert sorted(name for batch in made for name in batch) == sorted(sizes)
        for batch in made:
            assert len(batch) <= case["vae_batch_size"] and len({sizes[name] for name in batch}) == 1
        for together in case["batches"]:
            assert any(set(together) <= set(batch) for batch in made), together
        areas = [sizes[batch[0]][0] * sizes[batch[0]][1] for batch in made]
        assert areas == sorted(areas)


def test_a_second_run_keeps_everything(shapes, make_group):
    first, report = cache(make_group(shapes, flip_aug=True), batch_size=4)
    assert report.made == 6 and first.pictures == 12
    before = {path.name: path.stat().st_mtime_ns for path in shapes.glob("*.npz")}
    again, report = cache(make_group(shapes, flip_aug=True), batch_size=4)
    assert again.calls == [] and report.kept == 6 and not report.rebuilt
    assert {path.name: path.stat().st_mtime_ns for path in shapes.glob("*.npz")} == before


def test_one_edited_picture_is_encoded_once(shapes, make_group, caplog):
    cache(make_group(shapes), batch_size=4)
    untouched = (shapes / "b.npz").read_bytes()
    picture = Image.open(shapes / "c.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture.save(shapes / "c.png")
    with caplog.at_level("INFO"):
        encode, report = cache(make_group(shapes), batch_size=4)
    assert encode.pictures == 1 and report.kept == 5 and dict(report.rebuilt) == {"picture changed": 1}
    assert "5 kept, 1 rebuilt (picture changed: 1)" in caplog.text
    assert (shapes / "b.npz").read_bytes() == untouched


def test_a_moved_picture_is_known_by_its_content(shapes, make_group):
    cache(make_group(shapes))
    for path in shapes.glob("*.png"):
        os.utime(path, ns=(1, 1))
    encode, report = cache(make_group(shapes))
    assert encode.calls == [] and report.kept == 6
    # The new times are in the files, so that the content need not be read again.
    assert {read_header(path).key["source"]["mtime_ns"] for path in shapes.glob("*.npz")} == {1}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "broken file"),
        (lambda path: path.write_bytes(b""), "broken file"),
        (lambda path: np.savez(path, arr_0=np.zeros((4, 16, 16), np.float32)), "older format"),
    ],
)
def test_broken_files_are_made_anew(shapes, make_group, spoil, reason):
    cache(make_group(shapes))
    good = read_latents(shapes / "a.npz")
    spoil(shapes / "a.npz")
    encode, report = cache(make_group(shapes))
    assert encode.pictures == 1 and dict(report.rebuilt) == {reason: 1}
    assert torch.equal(read_latents(shapes / "a.npz").latents, good.latents)


@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        ({"flip_aug": True}, {}, "no flipped latents"),
        ({"alpha_mask": True}, {}, "no alpha mask"),
        ({"resize_interpolation": "lanczos"}, {}, "other settings"),
        ({}, {"vae": "second"}, "other VAE"),
        ({}, {"dtype": "bfloat16"}, "other precision"),
    ],
)
def test_other_settings_make_files_anew(shapes, make_group, settings, options, reason):
    start = {"vae": "first", "dtype": "float32"}
    cache(make_group(shapes), **start)
    encode, report = cache(make_group(shapes, **settings), **{**start, **options})
    assert encode.pictures >= 6 and dict(report.rebuilt) == {reason: 6}
    encode, report = cache(make_group(shapes, **settings), **{**start, **options})
    assert encode.calls == [] and report.kept == 6


def test_two_training_sizes_do_not_take_each_others_files(shapes, make_group):
    encode, report = cache(make_group(shapes, sizes=(128, 192)))
    assert report.made == 12 and len(list(shapes.glob("*.npz"))) == 12
    for sizes in ((128, 192), (128,), (192,), (192, 128)):
        group = make_group(shapes, sizes=sizes)
        encode, report = cache(group)
        assert encode.calls == [], sizes
        for batch in make_loader(group, group.plan(7, 1)):
            assert batch["latents"].shape[2:] == tuple(side // 8 for side in batch["target_sizes_hw"][0].tolist())


def test_another_family_does_not_take_the_file(shapes, make_group):
    cache(make_group(shapes))
    _, report = cache(make_group(shapes), family="sdxl")
    assert report.made == 6
    assert cache(make_group(shapes))[0].calls == [] and cache(make_group(shapes), family="sdxl")[0].calls == []


def test_pictures_that_differ_in_extension_have_their_own_files(tmp_path, make_group):
    Image.new("RGB", (128, 128), (255, 0, 0)).save(tmp_path / "p.png")
    Image.new("RGB", (128, 128), (0, 0, 255)).save(tmp_path / "p.webp", lossless=True)
    (tmp_path / "p.txt").write_text("x", encoding="utf-8")
    for expected in (2, 0):
        group = make_group(tmp_path)
        encode, _ = cache(group)
        assert encode.pictures == expected
        reds = {
            Path(i.path).name: read_latents(i.latents_npz).latents[0].mean().item() for i in group.datasets[0].items
        }
        assert reds == {"p.png": pytest.approx(1), "p.webp": pytest.approx(-1)}


def test_later_names_are_read(shapes, make_group):
    cache(make_group(shapes))
    for path in shapes.glob("*.npz"):
        width, height = Image.open(path.with_suffix(".png")).size
        path.rename(path.with_name(f"{path.stem}_{width:04d}x{height:04d}_sd.npz"))
    assert cache(make_group(shapes))[0].calls == []


def test_arrays_of_other_programs_stay(shapes, make_group):
    cache(make_group(shapes))
    with np.load(shapes / "a.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(shapes / "a.npz", **arrays, foreign=np.arange(3))
    cache(make_group(shapes), vae="new")
    cache(make_group(shapes, flip_aug=True), vae="new")
    with np.load(shapes / "a.npz") as file:
        assert file["foreign"].tolist() == [0, 1, 2] and "latents_flipped" in file.files


def test_skipping_the_check_takes_any_file(shapes, make_group):
    cache(make_group(shapes), vae="first")
    encode, report = cache(make_group(shapes), vae="second", skip_check=True)
    assert encode.calls == [] and report.kept == 6
    group = make_group(shapes, sizes=(192,))
    cache(group, skip_check=True)
    with pytest.raises(UserError, match="skip_cache_check"):
        list(make_loader(group, group.plan(7, 1)))


def test_processes_make_their_shares(shapes, make_group):
    def process(rank, wait):
        group = make_group(shapes, sizes=(128, 192))
        encode, _ = cache(group, rank=rank, processes=2, wait=wait)
        assert all(item.latents_npz for dataset in group.datasets for item in dataset.items)
        return encode.pictures

    assert side_by_side(process) == [6, 6]
    for path in sorted(shapes.glob("*.npz"))[:3]:
        path.unlink()  # however they are spread, the rest is shared out evenly
    assert sorted(side_by_side(process)) == [1, 2]
    assert side_by_side(process) == [0, 0]


def test_one_and_two_processes_make_equal_files(shapes, make_group, tmp_path):
    shutil.copytree(shapes, tmp_path / "two")
    cache(make_group(shapes, sizes=(128, 192), flip_aug=True), batch_size=2)
    side_by_side(
        lambda rank, wait: cache(
            make_group(tmp_path / "two", sizes=(128, 192), flip_aug=True),
            batch_size=2,
            rank=rank,
            processes=2,
            wait=wait,
        )
    )
    names = sorted(path.name for path in shapes.glob("*.npz"))
    assert names == sorted(path.name for path in (tmp_path / "two").glob("*.npz")) and len(names) == 12
    for name in names:
        one, two = (read_latents(folder / name) for folder in (shapes, tmp_path / "two"))
        assert torch.equal(one.latents, two.latents) and torch.equal(one.flipped, two.flipped)
        assert (one.original, one.ltrb) == (two.original, two.ltrb)


def test_a_share_that_was_not_made_is_noticed(shapes, make_group):
    with pytest.raises(UserError, match="another process did not cache"):
        cache(make_group(shapes), rank=0, processes=2, wait=lambda: None)


def test_memory_and_disk_give_equal_batches(shapes, make_group):
    disk, memory = (make_group(shapes, flip_aug=True, sizes=(128, 192)) for _ in range(2))
    cache(disk, batch_size=2)
    cache_latents(memory.datasets, Counting(), batch_size=3)
    plan = disk.plan(7, 1)
    for workers in (0, 2):
        pairs = zip(make_loader(disk, plan), make_loader(memory, plan, workers=workers), strict=True)
        assert all(same(a, b) for a, b in pairs)


def test_cached_and_read_pictures_agree(shapes, make_group):
    cached, direct = make_group(shapes), make_group(shapes)
    cache(cached)
    plan = cached.plan(7, 1)
    for a, b in zip(make_loader(cached, plan), make_loader(direct, plan), strict=True):
        torch.testing.assert_close(a["latents"], block_means(b["images"]))
        for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw", "captions", "input_ids"):
            assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]


@pytest.mark.parametrize("to_disk", [False, True])
def test_mixed_flip_settings(shapes, tmp_path, to_disk):
    """The original took one subset's flip setting for all."""
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (128, 128)).save(other / "o.png")
    items = [
        Item("a", str(shapes / "a.png"), "", (128, 128), 4),
        Item("o", str(other / "o.png"), "", (128, 128), 4, subset=1),
    ]
    settings = DatasetSettings(
        resolution=(128, 128), batch_size=8, subsets=(SubsetSettings(flip_aug=True), SubsetSettings())
    )
    group = build_group([settings], [ScanResult(items=items)], tokenize=None, seed=2)
    encode = Counting()
    cache_latents(group.datasets, encode, batch_size=4, to_disk=to_disk)
    assert encode.pictures == 3
    (batch,) = make_loader(group, group.plan(2, 1))
    flips = dict.fromkeys("ao", 0)
    for key, flipped in zip(batch["image_keys"], batch["flippeds"], strict=True):
        flips[key] += flipped
    assert flips["a"] > 0 and flips["o"] == 0


def test_alpha_masks_are_cached(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "p.png")

    def make():
        subset = SubsetSettings(image_dir=str(tmp_path), alpha_mask=True, flip_aug=True)
        settings = DatasetSettings(
            resolution=(64, 64), enable_bucket=True, min_bucket_reso=64, batch_size=8, subsets=(subset,)
        )
        item = Item("p", str(tmp_path / "p.png"), "", (80, 64), 8)
        return build_group([settings], [ScanResult(items=[item])], tokenize=None, seed=2)

    direct, disk, memory = make(), make(), make()
    cache(disk)
    cache_latents(memory.datasets, Counting())
    expected = next(make_loader(direct, direct.plan(2, 1)))
    for group in (disk, memory):
        batch = next(make_loader(group, direct.plan(2, 1)))
        assert set(batch["flippeds"]) == {True, False}
        torch.testing.assert_close(batch["alpha_masks"], expected["alpha_masks"])


@pytest.mark.parametrize("setting", ["color_aug", "random_crop"])
@pytest.mark.parametrize("to_disk", [False, True])
def test_changing_pictures_are_refused(shapes, make_group, setting, to_disk):
    with pytest.raises(UserError, match=setting):
        cache_latents(make_group(shapes, **{setting: True}).datasets, Counting(), to_disk=to_disk)


def test_data_sets_of_others_say_whether_they_can_be_cached(shapes, make_group):
    class Foreign:
        def __init__(self, cacheable):
            self.cacheable = cacheable

        def is_latent_cacheable(self):
            return self.cacheable

    group = make_group(shapes)
    report = cache_latents([*group.datasets, Foreign(True)], Counting())
    assert report.made == 6
    with pytest.raises(UserError, match="latents cannot be cached for Foreign"):
        cache_latents([*group.datasets, Foreign(False)], Counting())


def test_exchanged_functions(tmp_path):
    latents, flipped = torch.randn(4, 8, 12), torch.randn(4, 8, 12)
    path = tmp_path / "x.npz"
    save_latents_to_disk(path, latents, (96, 64), (0.0, 1.0, 96.0, 63.5), flipped)
    loaded, size, ltrb, mirrored = load_latents_from_disk(path)
    assert np.array_equal(loaded, latents.numpy()) and np.array_equal(mirrored, flipped.numpy())
    assert list(size) == [96, 64] and list(ltrb) == [0.0, 1.0, 96.0, 63.5]
    with np.load(path) as file:
        assert file.files == ["latents", "original_size", "crop_ltrb", "latents_flipped"]
    np.savez(path, arr_0=np.zeros(3))
    with pytest.raises(UserError, match="has no latents"):
        load_latents_from_disk(path)


def test_fingerprint_tells_models_apart():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8))
    first = fingerprint(model)
    assert first == fingerprint(model)
    with torch.no_grad():
        model[1].weight.mul_(1.01)
    assert fingerprint(model) != first
