"""Unreadable pictures: a stop before the training that names them, or left out and said (`--on_bad_image skip`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from library.data import images, picture_check
from library.data.loader import make_loader
from library.data.picture_check import MOST_NAMED, UnreadableFiles, unreadable
from library.data.records import DatasetSettings, SubsetSettings
from library.data.sources import scan, scan_all
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


def test_stop_names_cut_files_where_pixels_are_read(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        scan(settings(folder), check_pixels=True)
    assert error.value.problem == "cannot read 2 files"
    assert [Path(line.split(" (")[0]).name for line in error.value.details] == ["text.jpg", "cut.png"]
    assert "--on_bad_image skip" in error.value.remedy


def test_all_data_sets_are_told_at_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "x.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        scan_all([settings(folder), settings(other), settings(folder)])
    assert [Path(line.split(" (")[0]).name for line in error.value.details] == ["text.jpg", "x.png"]
    assert len(scan_all([settings(folder), settings(folder)], skip_broken=True)) == 2


def test_a_long_list_ends(tmp_path: Path) -> None:
    error = UnreadableFiles.of([f"{number}.png (broken)" for number in range(1000)])
    assert len(error.details) == MOST_NAMED + 1 and error.details[-1] == "and 800 more"
    assert str(UnreadableFiles.of(["a.png (broken)"])).startswith("cannot read a.png (broken): replace or remove")


class Reads:
    """Counts the pictures that are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        original = images.read_image
        monkeypatch.setattr(images, "read_image", lambda path: (self.names.append(Path(path).name), original(path)))

    def take(self) -> list[str]:
        names, self.names = sorted(self.names), []
        return names


def test_what_was_read_whole_is_not_read_again(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_TOOLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(picture_check, "FRESH_SECONDS", -1.0)  # the test's files are new
    reads = Reads(monkeypatch)
    paths = [str(folder / name) for name in ("a.png", "b.png", "cut.png", "a.png")]
    assert unreadable(paths).keys() == {str(folder / "cut.png")}
    assert reads.take() == ["a.png", "b.png", "cut.png"]
    assert unreadable(paths).keys() == {str(folder / "cut.png")}
    assert reads.take() == ["cut.png"]
    (folder / "a.png").write_bytes((folder / "cut.png").read_bytes())
    (folder / "b.png").unlink()
    bad = unreadable(paths)
    assert reads.take() == ["a.png", "b.png", "cut.png"]
    assert bad[str(folder / "b.png")] == str(folder / "b.png")
    assert len(bad) == 3


def test_the_memory_forgets_what_is_gone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(picture_check, "FRESH_SECONDS", -1.0)
    for number in range(4):
        (folder / "a.png").rename(folder / f"a{number}.png")
        unreadable([str(folder / f"a{number}.png")])
        (folder / f"a{number}.png").rename(folder / "a.png")
    (file,) = (tmp_path / "cache" / "picture_checks").iterdir()
    assert json.loads(file.read_text(encoding="utf-8")).keys() == {"a3.png"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a.png": 3}'])
def test_a_broken_memory_is_no_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("SD_TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(picture_check, "FRESH_SECONDS", -1.0)
    unreadable([str(folder / "a.png")])
    (file,) = (tmp_path / "cache" / "picture_checks").iterdir()
    file.write_text(content, encoding="utf-8")
    reads = Reads(monkeypatch)
    assert not unreadable([str(folder / "a.png")])
    assert reads.take() == ["a.png"]


def test_new_files_are_not_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may change again without their times showing it."""
    monkeypatch.setenv("SD_TOOLKIT_CACHE", str(tmp_path / "cache"))
    unreadable([str(folder / "a.png")])
    assert not (tmp_path / "cache").exists()


def test_a_memory_that_cannot_be_written_is_done_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("SD_TOOLKIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(picture_check, "FRESH_SECONDS", -1.0)
    assert not unreadable([str(folder / "a.png")])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_changes_or_goes_later_is_one_clear_line(tmp_path: Path, make_group, workers: int) -> None:
    for name, change, says in (
        ("gone.png", Path.unlink, "picture not found: .*gone.png: restore it"),
        ("other.png", lambda path: Image.new("RGB", (90, 64)).save(path), r"is 90x64 but was 64x64 when it was listed"),
        ("broken.png", lambda path: path.write_bytes(b"x"), r"cannot read picture .*broken.png"),
    ):
        place = tmp_path / name.partition(".")[0]
        place.mkdir()
        Image.new("RGB", (64, 64)).save(place / name)
        group = make_group(place, num_repeats=1)
        change(place / name)
        with pytest.raises(UserError, match=says) as error:
            list(make_loader(group, group.plan(1, 1), workers=workers))
        assert "\n" not in str(error.value) and error.value.remedy


def test_processes_share_the_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "text.jpg").unlink()
    reads = Reads(monkeypatch)
    told = 0
    for number in (0, 1):
        try:
            scan(settings(folder), check_pixels=True, share=(number, 2))
        except UserError as error:
            told += "cut.png" in str(error)
    assert (told, reads.take()) == (1, ["a.png", "b.png", "cut.png"])
    for number in (0, 1):  # what is left out must be known to all
        assert len(scan(settings(folder), skip_broken=True, share=(number, 2)).items) == 2
