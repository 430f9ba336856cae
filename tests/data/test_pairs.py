"""Conditioning pictures: found by name, cut and mirrored as their pictures; as masks they need not be complete."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.cache import cache_latents
from library.data.dataset import Dataset
from library.data.group import build_group
from library.data.records import DatasetSettings, ScanResult, SubsetSettings
from library.data.sources import scan
from library.messages import UserError
from tests.data.conftest import block_means, make_files

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "datasets_scan.json").read_text(encoding="utf-8"))["controlnet"]
# The original compared whole names; the stem is enough.
FOUND_NOW = {1: "k/a.jpg"}
REFUSALS = {
    2: "1 pictures have no picture of the same name in k .d/b.png.",
    3: "1 conditioning pictures belong to no training picture .k/z.png.",
    5: "another size than their pictures: k/a.png .50x40, d/a.png is 100x80.",
    7: "conditioning_data_dir k does not exist",
}


def build(*subsets: dict, kind: str = "controlnet", **values: object) -> tuple[Dataset, ScanResult]:
    own = tuple(SubsetSettings(kind=kind, **{"caption_extension": ".txt", **subset}) for subset in subsets)
    values = {"resolution": (64, 64), "min_bucket_reso": 64, "batch_size": 8, **values}
    settings = DatasetSettings(kind=kind, subsets=own, **values)
    found = scan(settings)
    return build_group([settings], [found], tokenize=None, seed=1).datasets[0], found


@pytest.mark.parametrize("number", range(len(CASES)))
def test_recorded_cases(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[number]
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, case["files"])
    values = {"resolution": tuple(case["resolution"]), "enable_bucket": case["enable_bucket"]}
    if number in REFUSALS:
        assert "error" in case["result"]
        with pytest.raises(UserError, match=REFUSALS[number]):
            build(*case["subsets"], **values)
        return
    dataset, _ = build(*case["subsets"], **values)
    if number in FOUND_NOW:
        assert "error" in case["result"]
        assert [item.conditioning for item in dataset.items] == [FOUND_NOW[number]]
        return
    batch = dataset[0]
    assert {
        "records": [
            {"key": item.key, "conditioning": item.conditioning, "caption": item.caption} for item in dataset.items
        ],
        "length": len(dataset),
        "images": list(batch["images"].shape),
        "conditioning_images": list(batch["conditioning_images"].shape),
    } == case["result"]


def draw(path: Path, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def pair(tmp_path: Path, size: tuple[int, int] = (90, 70)) -> dict:
    """Folders of one picture and the same pixels as its conditioning picture."""
    for folder in ("d", "k"):
        draw(tmp_path / folder / "a.png", size)
    return {"image_dir": str(tmp_path / "d"), "conditioning_data_dir": str(tmp_path / "k")}


@pytest.mark.parametrize("cached", [False, True])
def test_the_conditioning_picture_is_cut_and_mirrored_as_its_picture(cached: bool, tmp_path: Path) -> None:
    subset = {**pair(tmp_path), "flip_aug": True, "num_repeats": 8}
    dataset, _ = build(subset, enable_bucket=True, max_bucket_reso=128, bucket_reso_steps=32, min_bucket_reso=32)
    straight = dataset[0]
    assert set(straight["flippeds"]) == {True, False}
    assert torch.equal(straight["images"], straight["conditioning_images"])
    if cached:
        cache_latents([dataset], block_means)
        batch = dataset[0]
        assert batch["images"] is None and batch["flippeds"] == straight["flippeds"]
        assert torch.equal(batch["conditioning_images"], straight["conditioning_images"])


def test_cached_latents_without_buckets_are_of_the_cut_picture(tmp_path: Path) -> None:
    dataset, _ = build(pair(tmp_path), enable_bucket=False)
    cache_latents([dataset], block_means)
    batch = dataset[0]
    pooled = torch.nn.functional.avg_pool2d(batch["conditioning_images"], 8)
    torch.testing.assert_close(pooled, batch["latents"][:, :3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", [{"random_crop": True}, {"face_crop_aug_range": (1.0, 2.0)}])
def test_pictures_cut_at_random_places_are_refused(setting: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        build({**pair(tmp_path), **setting})


def test_an_unreadable_conditioning_picture_is_named_or_its_picture_left_out(tmp_path: Path) -> None:
    subset = pair(tmp_path)
    draw(tmp_path / "d" / "b.png", (90, 70))
    (tmp_path / "k" / "b.png").write_text("no picture")
    with pytest.raises(UserError, match=r"k/b\.png \(not a readable picture"):
        build(subset)
    settings = DatasetSettings(
        kind="controlnet", resolution=(64, 64), enable_bucket=True, subsets=(SubsetSettings(**subset),)
    )
    found = scan(settings, skip_broken=True)
    assert [Path(item.path).name for item in found.items] == ["a.png"]


def test_a_folder_of_folders_is_told_which_one_to_give(tmp_path: Path) -> None:
    subset = pair(tmp_path)
    (tmp_path / "k").rename(tmp_path / "below")
    (tmp_path / "k").mkdir()
    with pytest.raises(UserError, match="k holds no pictures: give the folder of"):
        build(subset)
    (tmp_path / "below").rename(tmp_path / "k" / "below")
    with pytest.raises(UserError, match=r"k holds no pictures: give .*k/below, which does"):
        build(subset)


def masked(tmp_path: Path, mask: np.ndarray, size: tuple[int, int] = (90, 70), **more: object) -> dict:
    draw(tmp_path / "d" / "a.png", size)
    (tmp_path / "k").mkdir()
    Image.fromarray(mask).save(tmp_path / "k" / "a.png")
    return {"image_dir": str(tmp_path / "d"), "conditioning_data_dir": str(tmp_path / "k"), **more}


def half_mask(size: tuple[int, int]) -> np.ndarray:
    """Left half black, right half white, in the first of three channels alone."""
    mask = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    mask[:, size[0] // 2 :, 0] = 255
    return mask


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("mask_size", [(128, 64), (64, 32)])
def test_masks_are_the_first_channel_and_follow_the_picture(
    cached: bool, mask_size: tuple[int, int], tmp_path: Path
) -> None:
    subset = masked(tmp_path, half_mask(mask_size), (128, 64), flip_aug=True, num_repeats=8)
    dataset, _ = build(subset, kind="dreambooth", enable_bucket=True)  # one bucket, 64x64: the middle is cut out
    if cached:
        cache_latents([dataset], block_means)
    batch = dataset[0]
    assert "conditioning_images" not in batch and set(batch["flippeds"]) == {True, False}
    for found, flipped in zip(batch["alpha_masks"], batch["flippeds"], strict=True):
        wanted = torch.zeros(64, 64)
        wanted[:, 32:] = 1
        torch.testing.assert_close(found, wanted.flip(-1) if flipped else wanted, atol=0.51, rtol=0)
        assert (found - (wanted.flip(-1) if flipped else wanted)).abs().mean() < 0.01


def test_masks_follow_random_crops(tmp_path: Path) -> None:
    draw(tmp_path / "d" / "a.png", (128, 96))
    draw(tmp_path / "k" / "a.png", (128, 96))
    subset = {"image_dir": str(tmp_path / "d"), "conditioning_data_dir": str(tmp_path / "k"), "random_crop": True}
    for enable_bucket in (False, True):
        dataset, _ = build({**subset, "num_repeats": 6}, kind="dreambooth", enable_bucket=enable_bucket)
        batch = dataset[0]
        torch.testing.assert_close(batch["alpha_masks"], batch["images"][:, 0] / 2 + 0.5, atol=2 / 255, rtol=0)
        assert len({tuple(image.flatten()[:50].tolist()) for image in batch["images"]}) > 1


def test_pictures_without_a_mask_count_whole_and_are_named(tmp_path: Path) -> None:
    subset = masked(tmp_path, half_mask((90, 70)))
    draw(tmp_path / "d" / "b.png", (90, 70))
    draw(tmp_path / "k" / "z.png", (90, 70))
    dataset, found = build(subset, kind="dreambooth", enable_bucket=True)
    masks = dict(zip(dataset[0]["image_keys"], dataset[0]["alpha_masks"], strict=True))
    means = {Path(key).name: mask.mean().item() for key, mask in masks.items()}
    assert means["b.png"] == 1 and means["a.png"] < 0.6
    notes = "\n".join(found.notes)
    assert "1 pictures have no picture of the same name" in notes and "trained without a mask" in notes
    assert "1 conditioning pictures belong to no training picture" in notes


def test_a_mask_comes_before_the_alpha_channel(tmp_path: Path) -> None:
    subset = masked(tmp_path, half_mask((64, 64)), (64, 64), alpha_mask=True)
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(tmp_path / "d" / "a.png")
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(tmp_path / "d" / "b.png")
    dataset, _ = build(subset, kind="dreambooth")
    masks = dict(zip(dataset[0]["image_keys"], dataset[0]["alpha_masks"], strict=True))
    assert sorted(mask.mean().item() for mask in masks.values()) == [0.0, 0.5]


def test_masks_that_fit_no_picture_are_refused(tmp_path: Path) -> None:
    subset = masked(tmp_path, half_mask((90, 70)))
    (tmp_path / "k" / "a.png").rename(tmp_path / "k" / "other.png")
    with pytest.raises(UserError, match="no picture has a mask"):
        build(subset, kind="dreambooth")
    Image.fromarray(half_mask((70, 90))).save(tmp_path / "k" / "a.png")
    with pytest.raises(UserError, match="another shape"):
        build(subset, kind="dreambooth", enable_bucket=True)
