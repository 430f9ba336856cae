"""What a run says and shows of its loss masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.group import DatasetGroup, build_group
from library.data.masks import count_masks, has_alpha, write_overlays
from library.data.records import DatasetSettings, ScanResult, SubsetSettings
from library.data.sources import scan


def save(path: Path, size: tuple[int, int], mode: str = "RGB", colour: object = 200) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, size in {"a": (96, 32), "b": (32, 96), "c": (96, 32), "e": (64, 64)}.items():
        save(tmp_path / "d" / f"{name}.png", size, colour=(200, 200, 200))
    mask = np.zeros((32, 96), np.uint8)
    mask[:, 48:] = 255
    for name in ("a", "c"):
        save(tmp_path / "m" / f"{name}.png", (96, 32))
        Image.fromarray(mask).save(tmp_path / "m" / f"{name}.png")
    save(tmp_path / "m" / "b.png", (32, 96), "L", 255)
    return tmp_path


def build(root: Path, **subset: object) -> tuple[DatasetGroup, list[DatasetSettings], list[ScanResult]]:
    own = SubsetSettings(image_dir=str(root / "d"), **subset)
    settings = DatasetSettings(
        resolution=(64, 64), enable_bucket=True, min_bucket_reso=32, bucket_reso_steps=32, subsets=(own,)
    )
    scans = [scan(settings)]
    return build_group([settings], scans, tokenize=None, seed=1), [settings], scans


def test_masks_are_counted(folders: Path) -> None:
    _, settings, scans = build(folders, conditioning_data_dir=str(folders / "m"))
    assert count_masks(settings, scans) == (3, 4)
    _, settings, scans = build(folders)
    assert count_masks(settings, scans) is None


def test_alpha_channels_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "d" / "a.png", (64, 64), "RGBA", (9, 9, 9, 9))
    save(tmp_path / "d" / "b.png", (64, 64))
    palette = Image.new("P", (64, 64))
    palette.info["transparency"] = 0
    palette.save(tmp_path / "d" / "c.png", transparency=0)
    _, settings, scans = build(tmp_path, alpha_mask=True)
    assert count_masks(settings, scans) == (2, 3)
    assert not has_alpha(str(tmp_path / "gone.png"))


def test_one_picture_of_each_bucket_shows_its_mask(folders: Path) -> None:
    group, _, _ = build(folders, conditioning_data_dir=str(folders / "m"), flip_aug=True)
    files = write_overlays(group, folders / "out", "run")
    assert sorted(file.name for file in files) == ["run-32x96.png", "run-96x32.png"]
    wide = np.asarray(Image.open(folders / "out" / "masks" / "run-96x32.png")).astype(int)
    assert wide.shape == (32, 96, 3)
    assert (wide[:, -30:] == 200).all()  # counts in full: as it is
    assert (wide[:, :30, 1] < 110).all() and (wide[:, :30, 0] - wide[:, :30, 1] > 60).all()


def test_without_masks_nothing_is_written(folders: Path) -> None:
    group, _, _ = build(folders)
    assert write_overlays(group, folders / "out", "run") == []
    assert not (folders / "out").exists()
