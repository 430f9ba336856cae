"""The index of picture sizes: what it remembers, and that it is never wrong."""

from __future__ import annotations

import os
import shutil
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data import index
from library.data.image_size import facts_of_open_file, size_and_orientation
from library.data.index import facts_of_paths, picture_facts


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """A user's cache folder, and an index for small and fresh folders too."""
    monkeypatch.setenv("SD_TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "FEWEST", 1)
    monkeypatch.setattr(index, "FRESH_SECONDS", -1e9)
    return tmp_path / "cache"


@pytest.fixture
def opened(monkeypatch):
    """Names of the files whose headers were read."""
    names = []

    def read(handle, path):
        names.append(os.path.basename(path))
        return facts_of_open_file(handle, path)

    monkeypatch.setattr(index, "facts_of_open_file", read)
    return names


def picture(path, size, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture(folder / "a.png", (10, 20))
    picture(folder / "b.jpg", (30, 10), orientation=6)
    picture(folder / "ü.webp", (10, 20))
    (folder / "broken.png").write_bytes(b"no picture at all, but long enough for a header")
    return folder


NAMES = ["a.png", "b.jpg", "broken.png", "gone.png", "ü.webp"]


def checked(folder, names=NAMES):
    facts = picture_facts(folder, names)
    for name, found in zip(names, facts, strict=True):
        try:
            assert found == size_and_orientation(folder / name), name
        except OSError:
            assert isinstance(found, OSError), name
    return facts


def test_files_are_opened_once(folder, remembered, opened):
    first = checked(folder)
    assert first[:2] == [((10, 20), 1), ((30, 10), 6)] and sorted(opened) == sorted(set(NAMES) - {"gone.png"})
    opened.clear()
    again = checked(folder)
    assert opened == ["broken.png"]  # what is no picture is looked at again
    assert again[0] is again[4]  # equal facts are shared


def test_only_what_changed_is_opened(folder, remembered, opened):
    checked(folder)
    opened.clear()
    picture(folder / "a.png", (12, 20))
    picture(folder / "new.png", (5, 6))
    checked(folder, [*NAMES, "new.png"])
    assert sorted(opened) == ["a.png", "broken.png", "new.png"]
    opened.clear()
    checked(folder, ["new.png", "a.png"])  # in any order
    checked(folder, ["b.jpg"])
    assert opened == []


def test_a_copy_or_another_folder_is_read_for_itself(folder, remembered, opened, tmp_path):
    checked(folder)
    shutil.copytree(folder, tmp_path / "copy")
    opened.clear()
    checked(tmp_path / "copy", ["a.png", "b.jpg"])
    assert opened == ["a.png", "b.jpg"]
    opened.clear()
    (tmp_path / "link").symlink_to(folder)  # a link is the same folder
    checked(tmp_path / "link", ["a.png", "b.jpg"])
    assert opened == []


@pytest.mark.skipif(os.name == "nt", reason="no time of status change")
def test_an_old_time_put_back_is_noticed(folder, remembered):
    Image.new("RGBA", (3, 4)).save(folder / "x.bmp")
    os.utime(folder / "x.bmp", ns=(5, 5))
    checked(folder, ["x.bmp"])
    before = os.stat(folder / "x.bmp").st_ctime_ns
    while os.stat(folder / "x.bmp").st_ctime_ns == before:  # until the system's clock has ticked
        Image.new("RGBA", (4, 3)).save(folder / "x.bmp")
        os.utime(folder / "x.bmp", ns=(5, 5))
    checked(folder, ["x.bmp"])


def test_fresh_files_are_not_trusted(folder, remembered, opened, monkeypatch):
    monkeypatch.setattr(index, "FRESH_SECONDS", 2.0)
    for _ in range(2):
        opened.clear()
        checked(folder, ["a.png"])
        assert opened == ["a.png"]
    assert not remembered.exists()


def test_small_folders_have_no_index_file(folder, remembered, monkeypatch):
    monkeypatch.setattr(index, "FEWEST", 64)
    checked(folder)
    assert not remembered.exists()


@pytest.mark.parametrize("spoil", [lambda d: d[:-1], lambda d: d[:20], lambda d: b"", lambda d: d[:50] + b"x" + d[51:]])
def test_broken_index_files_are_made_anew(folder, remembered, opened, spoil):
    checked(folder)
    (file,) = remembered.rglob("*.index")
    good = file.read_bytes()
    file.write_bytes(spoil(good))
    opened.clear()
    checked(folder)
    assert "a.png" in opened and file.read_bytes() == good


def test_a_place_that_cannot_be_written_costs_nothing_but_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "FEWEST", 1)
    monkeypatch.setattr(index, "FRESH_SECONDS", -1e9)
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), ""):
        monkeypatch.setenv("SD_TOOLKIT_CACHE", place)
        checked(folder)
        checked(folder)


def test_processes_at_once(folder, remembered):
    threads = [threading.Thread(target=checked, args=(folder,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checked(folder)
    assert len(list(remembered.rglob("*"))) == 2  # its folder and one file


def test_paths_in_several_folders(folder, remembered, tmp_path):
    picture(tmp_path / "top.png", (7, 8))
    paths = [str(folder / "b.jpg"), str(tmp_path / "top.png"), str(folder / "a.png")]
    assert facts_of_paths(paths) == {path: size_and_orientation(path) for path in paths}


STEP = st.tuples(
    st.sampled_from(["write", "write", "delete", "rename", "swap", "ask"]),
    st.sampled_from("ab"),
    st.sampled_from("ab"),
    st.sampled_from([(3, 4), (4, 3)]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=2, max_size=12), fresh=st.booleans())
def test_never_wrong(steps, fresh, tmp_path, monkeypatch):
    """Whatever happens to the files between two starts; BMP files of 3x4 and 4x3 pixels have equal lengths."""
    monkeypatch.setenv("SD_TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "FEWEST", 1)
    monkeypatch.setattr(index, "FRESH_SECONDS", 2.0 if fresh else -1e9)
    folder = tmp_path / "never_wrong"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    folder.mkdir()
    for number, (action, first, second, size) in enumerate(steps):
        one, two = folder / f"{first}.bmp", folder / f"{second}.bmp"
        if action == "write":
            Image.new("RGBA", size).save(one)
            if not fresh:  # stands for a clock that counts every write
                os.utime(one, ns=(number, number))
        elif action == "delete":
            one.unlink(missing_ok=True)
        elif action == "rename" and one.exists():
            one.replace(two)
        elif action == "swap" and one.exists() and two.exists():
            one.replace(folder / "other")
            if two.exists():
                two.replace(one)
            (folder / "other").replace(two)
        checked(folder, ["a.bmp", "b.bmp"])
