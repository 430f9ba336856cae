"""Unreadable pictures: a stop that names them, or left out and said (`--on_bad_image skip`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.data.records import DatasetSettings, SubsetSettings
from library.data.sources import scan
from library.messages import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "cut.png"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / name)
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture", encoding="utf-8")
    return tmp_path


def settings(folder: Path) -> DatasetSettings:
    return DatasetSettings(subsets=[SubsetSettings(image_dir=str(folder))], resolution=(64, 64), batch_size=1)


def test_stop(folder: Path) -> None:
    with pytest.raises(UserError, match=r"text\.jpg"):
        scan(settings(folder))


def test_skip_finds_cut_files_too(folder: Path) -> None:
    result = scan(settings(folder), skip_broken=True)
    assert sorted(Path(item.path).name for item in result.items) == ["a.png", "b.png"]
    notes = [note for note in result.notes if "left out" in note]
    assert len(notes) == 1
    assert "2 pictures are left out" in notes[0]
    assert "cut.png" in notes[0]
    assert "text.jpg" in notes[0]
