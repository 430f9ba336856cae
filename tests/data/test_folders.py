"""`N_name` folders, and the advice about folders that are one level off."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from library.data.folders import parse_name, required_tables, subset_tables
from library.data.listing import glob_images, glob_images_pathlib, list_folder
from library.messages import UserError


def pictures(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [("10_sks dog", (10, "sks dog")), ("3_a_b", (3, "a_b")), ("5", (5, "")), ("x_1", None), ("-2_n", (-2, "n"))],
)
def test_names(name: str, parsed: tuple[int, str] | None) -> None:
    assert parse_name(name) == parsed


def test_folders_come_in_the_order_of_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("9_b", "10_a", "0_zero", "loose"):
        pictures(tmp_path / name / "a.png")
    with caplog.at_level(logging.WARNING, "toolkit"):
        tables = subset_tables(str(tmp_path))
    assert [(Path(t["image_dir"]).name, t["num_repeats"], t["class_tokens"]) for t in tables] == [
        ("10_a", 10, "a"),
        ("9_b", 9, "b"),
    ]
    assert "0_zero" in caplog.text and "loose" in caplog.text


def test_pictures_without_named_folders_are_one_subset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "flat"
    pictures(folder / "a.png")
    with caplog.at_level(logging.WARNING, "toolkit"):
        tables = required_tables(str(folder), "--train_data_dir")
    assert tables == [{"image_dir": str(folder), "num_repeats": 1, "is_reg": False}]
    assert "used once per epoch" in caplog.text


def test_named_folders_one_level_down_are_told_beside_loose_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures(tmp_path / "flat" / "sheet.png", tmp_path / "flat" / "img" / "3_dog" / "a.png")
    with caplog.at_level(logging.WARNING, "toolkit"):
        required_tables(str(tmp_path / "flat"), "--train_data_dir")
    assert f"is --train_data_dir {tmp_path / 'flat' / 'img'} meant?" in caplog.text


def test_loose_pictures_beside_named_folders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path / "a.png", tmp_path / "1_x" / "b.png")
    with caplog.at_level(logging.WARNING, "toolkit"):
        assert len(required_tables(str(tmp_path), "--train_data_dir")) == 1
    assert "1 pictures directly in" in caplog.text


def test_advice_names_the_path_that_works(tmp_path: Path) -> None:
    pictures(tmp_path / "up" / "img" / "10_dog" / "a.png", tmp_path / "plain" / "dog" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    advice = {
        "up": f"--train_data_dir {tmp_path / 'up' / 'img'}",
        "up/img/10_dog": f"--train_data_dir {tmp_path / 'up' / 'img'}",
        "": f"--train_data_dir {tmp_path / 'up' / 'img'}",
        "plain": f"to {tmp_path / 'plain' / '10_dog'}",
        "empty": "holds no pictures",
        "file": "is a file",
        "gone": "does not exist",
    }
    for name, words in advice.items():
        with pytest.raises(UserError) as error:
            required_tables(str(tmp_path / name), "--train_data_dir")
        assert words in str(error.value), name


def test_listing(tmp_path: Path) -> None:
    pictures(tmp_path / "b.PNG", tmp_path / "a.jpg", tmp_path / ".c.png", tmp_path / "sub" / "d.png")
    (tmp_path / "a.txt").write_text("x")
    listing = list_folder(tmp_path)
    assert (listing.pictures, listing.others, listing.folders) == (["a.jpg", "b.PNG"], [".c.png", "a.txt"], ["sub"])
    assert glob_images(str(tmp_path)) == [str(tmp_path / "a.jpg"), str(tmp_path / "b.PNG")]
    assert glob_images(str(tmp_path), "b") == [str(tmp_path / "b.PNG")]
    assert glob_images_pathlib(tmp_path, recursive=False) == [tmp_path / "a.jpg", tmp_path / "b.PNG"]
    assert glob_images_pathlib(tmp_path, recursive=True)[-1] == tmp_path / "sub" / "d.png"
