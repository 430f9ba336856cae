"""A data set with every kind of fault planted: the report names each with its file, and is silent on a good one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from library.data.inspection_text import lines_of
from tests.data.test_inspection import drawing, report

HEAD = """
[general]
caption_extension = ".txt"
resolution = 128
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 32
"""


class Folder:
    """Pictures with captions, and the table of the data-set file that names them."""

    def __init__(self, path: Path, count: int, first: int) -> None:
        self.path = path
        path.mkdir(parents=True)
        for i in range(count):
            self.add(f"{i}.png", first + i)

    def add(self, name: str, seed: int, size: tuple[int, int] = (128, 128), caption: str | None = "a cat") -> Path:
        file = self.path / name
        drawing(seed, size).save(file)
        if caption is not None:
            file.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return file

    def bytes(self, name: str, data: bytes) -> None:
        (self.path / name).write_bytes(data)


def subset(folder: Path, *lines: str) -> str:
    return "\n".join(["  [[datasets.subsets]]", f"  image_dir = '{folder}'", *(f"  {line}" for line in lines), ""])


@pytest.fixture
def good(tmp_path: Path) -> Path:
    root = tmp_path / "good"
    Folder(root / "cats", 6, 1000)
    Folder(root / "dogs", 6, 1100)
    text = HEAD + "[[datasets]]\n" + subset(root / "cats") + subset(root / "dogs", "is_reg = true")
    (root / "data.toml").write_text(text, encoding="utf-8")
    return root


def plant_files(folder: Folder) -> dict[str, str]:
    """Faults of single files: file -> part of the report that must name it."""
    png = (folder.path / "0.png").read_bytes()
    drawing(7, (160, 160)).save(folder.path / "whole.jpg")
    jpeg = (folder.path / "whole.jpg").read_bytes()
    (folder.path / "whole.jpg").unlink()
    folder.bytes("words.png", b"these are words")
    folder.bytes("nothing.png", b"")
    folder.bytes("short.png", png[:400])
    folder.bytes("short.jpg", jpeg[:1500])
    os.symlink(folder.path / "gone.png", folder.path / "link.png")
    for name in ("words", "nothing", "short", "link"):
        folder.bytes(f"{name}.txt", b"a cat")
    folder.add("latin.png", 20, caption=None)
    folder.bytes("latin.txt", "ein Hündchen".encode("latin-1"))
    folder.add("void.png", 21, caption="")
    folder.add("blank.png", 22, caption=" \n")
    folder.add("bare.png", 23, caption=None)
    folder.add("long.png", 24, caption="cat " * 76)
    folder.add("tiny.png", 25, (40, 40))
    folder.add("slim.png", 26, (512, 64))
    folder.bytes("copy.png", png)
    folder.bytes("copy.txt", b"a cat")
    drawing(1, (128, 128)).save(folder.path / "again.jpg", quality=75)
    folder.bytes("again.txt", b"a cat")
    folder.bytes("orphan.txt", b"a cat")
    folder.bytes("film.gif", b"GIF89a")
    return {
        **dict.fromkeys(("words.png", "nothing.png", "short.png", "short.jpg", "link.png"), "unreadable"),
        **dict.fromkeys(("latin.txt", "void.txt"), "unreadable"),
        "blank.png": "empty",
        "bare.png": "missing",
        "long.png": "longest",
        "tiny.png": "enlarged",
        "slim.png": "cropped",
        "copy.png": "duplicates",
        "again.jpg": "similar",
        "orphan.txt": "orphans",
    }


def section(facts: dict, name: str) -> str:
    """The part of a report as JSON text."""
    parts = {**facts["files"], **facts["captions"], **(facts["captions"]["tokens"] or {}), **facts["datasets"][0]}
    return json.dumps(parts[name])


def test_a_good_data_set_is_silent(good: Path) -> None:
    facts, _ = report(good)
    assert facts["problems"] == [] and facts["notes"] == []
    assert not any(facts["files"].values()) and not facts["captions"]["missing"]


def test_every_planted_fault_is_named(tmp_path: Path) -> None:
    root = tmp_path / "bad"
    cats = Folder(root / "cats", 4, 0)
    files = plant_files(cats)
    Folder(root / "deep" / "inner", 1, 2000)
    other = Folder(root / "other", 2, 2100)
    for file in other.path.glob("*.txt"):
        file.rename(file.with_suffix(".caption"))
    opaque = Folder(root / "opaque", 2, 2200)
    for file in opaque.path.glob("*.png"):
        with Image.open(file) as image:
            image.convert("RGBA").save(file)
    many = Folder(root / "many", 60, 2300)
    small = Folder(root / "small", 1, 2400)
    small.add("dot.png", 2450, (20, 20))
    twins = Folder(root / "twins", 0, 0)
    for i in range(8):
        twins.add(f"{i}.png", 2500 + i // 4)
    text = HEAD + "[[datasets]]\n" + subset(cats.path) + subset(cats.path) + subset(root / "nowhere")
    text += (
        subset(root / "deep")
        + subset(other.path, "num_repeats = 2")
        + subset(root / "deep" / "inner", "num_repeats = 0")
    )
    text += subset(opaque.path, "alpha_mask = true") + subset(many.path, "is_reg = true", 'class_tokens = "thing"')
    text += "[[datasets]]\nbucket_no_upscale = true\n" + subset(small.path)
    text += "[[datasets]]\nvalidation_split = 0.5\n" + subset(twins.path)
    (root / "data.toml").write_text(text, encoding="utf-8")
    facts, _ = report(root)

    unnamed = [f"{name} in {part}" for name, part in files.items() if name not in section(facts, part)]
    assert not unnamed
    lines = "\n".join(lines_of(facts))
    said = {
        "a folder used twice": f"{cats.path} is left out: the same folder is used before",
        "no such folder": f"{root / 'nowhere'} is left out: it does not exist",
        "a folder too high": f"but {root / 'deep' / 'inner'} does: name that as image_dir",
        "captions of another ending": "is caption_extension .caption meant?",
        "no uses": f"{root / 'deep' / 'inner'} is left out: num_repeats is 0",
        "formats that are not read": "1 .gif files are not read",
        "masks that do nothing": "no picture has transparent places",
        "too many regularisation pictures": "regularisation pictures not used",
        "too small for a bucket": "pictures left out, smaller than bucket_reso_steps: 1",
        "held out and trained on": "held-out pictures that are trained on too",
        "unreadable": f"files that cannot be read: {list(files.values()).count('unreadable')}",
    }
    assert not [fault for fault, text in said.items() if text not in lines]
    assert len(files) + len(said) >= 25


def test_no_good_file_is_accused(tmp_path: Path) -> None:
    """What is planted and nothing else stands in the lists of single files."""
    root = tmp_path / "bad"
    cats = Folder(root / "cats", 4, 0)
    files = plant_files(cats)
    (root / "data.toml").write_text(HEAD + "[[datasets]]\n" + subset(cats.path), encoding="utf-8")
    facts, _ = report(root)
    partners = {"copy.png": {"0.png"}, "again.jpg": {"1.png"}, "long.png": None}
    for part in set(files.values()) - {"longest"}:
        planted = {name for name, where in files.items() if where == part}
        allowed = planted.union(*(partners.get(name) or () for name in planted))
        named = {name for name in os.listdir(cats.path) if f"/{name}" in section(facts, part)}
        # a picture whose caption file is broken has no caption either
        assert named - {"bare.png", "short.jpg"} <= allowed, part
    cut = [entry["path"] for entry in facts["captions"]["tokens"]["longest"] if entry["cut"]]
    assert [Path(path).name for path in cut] == ["long.png"]
