"""A data set with more than twenty kinds of fault, always the same ones: each is named, nothing else is."""

from __future__ import annotations

import os
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.group import build_group
from library.data.picture_check import UnreadableFiles
from library.data.records import DatasetSettings, SubsetSettings
from library.data.sources import scan_all
from library.messages import UserError

SEED = 20
GOOD = 40
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG", ".Jpg")
MODES = {".png": ("RGB", "RGBA", "P", "L", "LA", "1"), ".jpg": ("RGB", "L", "CMYK"), ".webp": ("RGB", "RGBA")}


def noise(draw: random.Random, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA")


def save(path: Path, draw: random.Random, size: tuple[int, int] = (64, 64)) -> None:
    """A good picture of any mode that its format has."""
    suffix = path.suffix.lower().replace("jpeg", "jpg")
    mode = draw.choice(MODES.get(suffix, ("RGB", "L", "P", "1")))
    kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}[suffix]
    noise(draw, size).convert(mode).save(path, kind)


def caption(path: Path, text: str | bytes = "a text, parts") -> None:
    path.with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def png(width: int, height: int, body: bytes) -> bytes:
    chunks = [(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"), (b"IDAT", body)]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in [*chunks, (b"IEND", b"")]:
        data += len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    return data


def cut(suffix: str) -> Callable[[Path, random.Random], str]:
    def plant(folder: Path, draw: random.Random) -> str:
        path = folder / f"cut{suffix}"
        noise(draw).convert("RGB").save(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
        caption(path)
        return path.name

    return plant


def content(name: str, data: bytes) -> Callable[[Path, random.Random], str]:
    def plant(folder: Path, _: random.Random) -> str:
        (folder / name).write_bytes(data)
        caption(folder / name)
        return name

    return plant


def damaged_pixels(folder: Path, draw: random.Random) -> str:
    path = folder / "damaged.png"
    noise(draw).save(path)
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(data)
    caption(path)
    return path.name


def broken_link(folder: Path, _: random.Random) -> str:
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    caption(folder / "link.png")
    return "link.png"


def bad_caption(name: str, text: bytes) -> Callable[[Path, random.Random], str]:
    def plant(folder: Path, draw: random.Random) -> str:
        save(folder / f"{name}.png", draw)
        caption(folder / f"{name}.png", text)
        return f"{name}.txt"

    return plant


# Faults that make a file unusable -> plants one and gives the name that must be told.
BROKEN: dict[str, Callable[[Path, random.Random], str]] = {
    "a cut PNG": cut(".png"),
    "a cut JPEG": cut(".jpg"),
    "a cut WebP": cut(".webp"),
    "a cut BMP": cut(".bmp"),
    "damaged pixels": damaged_pixels,
    "an empty file": content("empty.png", b""),
    "a text": content("text.jpg", b"this is no picture"),
    "a page of a server that refused": content("page.png", b"<!DOCTYPE html><html>403 Forbidden</html>"),
    "zeros": content("zeros.jpeg", bytes(5000)),
    "a bomb": content("bomb.png", png(60000, 60000, zlib.compress(b""))),
    "no width": content("flat.png", png(0, 64, zlib.compress(b""))),
    "an index of git instead of a large file": content("lfs.png", b"version https://git-lfs.github.com/spec/v1\n"),
    "a caption of another encoding": bad_caption("latin", b"fian\xc3\xa7ade et th\xe9"),
    "a caption in UTF-16 without mark": bad_caption("wide", "a caption".encode("utf-16-le")),
    "an empty caption": bad_caption("silent", b""),
}
if os.name == "posix":
    BROKEN["a broken link"] = broken_link


def missing_caption(folder: Path, draw: random.Random) -> str:
    save(folder / "mute.png", draw)
    return r"1 pictures have no \.txt file \(mute\.png\), their caption is empty$"


def other_extension(folder: Path, draw: random.Random) -> str:
    save(folder / "other.png", draw)
    (folder / "other.caption").write_text("x", encoding="utf-8")
    return (
        r"1 pictures have no \.txt file \(other\.png\).*have a \.caption file: is caption_extension \.caption meant\?"
    )


def upper_case_extension(folder: Path, draw: random.Random) -> str:
    save(folder / "loud.png", draw)
    (folder / "loud.TXT").write_text("x", encoding="utf-8")
    return r"loud\.png.*have a \.TXT file: is caption_extension \.TXT meant\?"


def orphan(folder: Path, _: random.Random) -> str:
    caption(folder / "orphan")
    return r"1 \.txt files have no picture \(orphan\.txt\)"


def unread_formats(folder: Path, draw: random.Random) -> str:
    noise(draw).save(folder / "scan.tiff")
    (folder / "phone.HEIC").write_bytes(b"x")
    return r"1 \.heic, 1 \.tiff files are not read: convert them"


def folder_below(folder: Path, draw: random.Random) -> str:
    (folder / "more").mkdir()
    save(folder / "more" / "deep.png", draw)
    return r"pictures in folders below it are not used: more$"


def twins(folder: Path, draw: random.Random) -> str:
    for suffix in (".png", ".jpg"):
        save(folder / f"twin{suffix}", draw)
    caption(folder / "twin.png")
    return r"differ in their ending alone share a caption file: twin\.jpg, twin\.png$"


def tiny(folder: Path, draw: random.Random) -> str:
    save(folder / "tiny.png", draw, (12, 12))
    caption(folder / "tiny.png")
    return r"1 pictures are enlarged more than twice to 64x64 \(.*tiny\.png\)"


def caption_folder(folder: Path, draw: random.Random) -> str:
    save(folder / "strange.png", draw)
    (folder / "strange.txt").mkdir()
    return r"1 pictures have no \.txt file \(strange\.png\)"


# Faults that a training can live with -> plants one in a folder of its own and gives what must be said of it.
ODD: dict[str, Callable[[Path, random.Random], str]] = {
    "no caption": missing_caption,
    "captions with another extension": other_extension,
    "a caption for no picture": orphan,
    "formats that are not read": unread_formats,
    "a folder below": folder_below,
    "pictures that differ in their ending": twins,
    "a tiny picture": tiny,
    "a folder instead of a caption": caption_folder,
}
if os.path.normcase("A") == "A" and not Path(__file__.upper()).exists():
    ODD["captions with an extension in capitals"] = upper_case_extension


def nothing_there(root: Path) -> list[tuple[SubsetSettings, str]]:
    """Subsets without a usable folder, and what must be said of them."""
    (root / "empty").mkdir()
    (root / "high" / "pictures").mkdir(parents=True)
    save(root / "high" / "pictures" / "a.png", random.Random(1))
    (root / "file").write_text("", encoding="utf-8")
    return [
        (subset(root / "nowhere"), r"nowhere is left out: it does not exist"),
        (subset(root / "file"), r"file is left out: it is no folder"),
        (subset(root / "empty"), r"empty holds no pictures$"),
        (subset(root / "high"), r"high holds no pictures, but .*pictures does: name that as image_dir"),
        (subset(root / "good" / "."), r"good/?\.? is left out: the same folder is used before as .*good"),
        (subset(root / "unused", num_repeats=0), r"unused is left out: num_repeats is 0"),
    ]


def subset(folder: Path, **settings: object) -> SubsetSettings:
    return SubsetSettings(image_dir=str(folder), caption_extension=".txt", **settings)


def good_folder(root: Path, draw: random.Random) -> set[str]:
    """Many good pictures with good captions; gives their paths."""
    root.mkdir()
    for number in range(GOOD):
        name = f"{draw.choice(['good', '猫', 'bild ä', 'x.y', '[1]'])} {number}"
        path = root / f"{name}{draw.choice(SUFFIXES)}"
        save(path, draw, (draw.randint(40, 150), draw.randint(40, 150)))
        text = draw.choice(["a, b", "ein Kätzchen", "猫\nsecond line", " "])
        encoded = text.encode(draw.choice(["utf-8", "utf-8-sig", "utf-16"]))
        (root / f"{name}.txt").write_bytes(encoded)
    return {str(path) for path in root.iterdir() if path.suffix != ".txt"}


def settings_of(*subsets: SubsetSettings) -> DatasetSettings:
    return DatasetSettings(
        resolution=(64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=8,
        subsets=subsets,
    )  # fmt: skip


@pytest.mark.filterwarnings("error::UserWarning")
def test_every_broken_file_is_named_and_no_other(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    good = good_folder(tmp_path / "good", draw)
    planted = {kind: plant(tmp_path / "good", draw) for kind, plant in BROKEN.items()}
    assert len(set(planted.values())) == len(planted) >= 15
    settings = settings_of(subset(tmp_path / "good"))
    with pytest.raises(UnreadableFiles) as error:
        scan_all([settings], check_pixels=True)
    named = {Path(line.partition(" (")[0]).name for line in error.value.details}
    assert named == set(planted.values())
    assert all("(" in line and line.endswith(")") for line in error.value.details), "a reason is missing"
    (result,) = scan_all([settings], skip_broken=True)
    assert {item.path for item in result.items} == good
    assert len(result.broken) == len(planted)
    batches = build_group([settings], [result], tokenize=None, seed=1)
    assert sum(len(batches[number]["captions"]) for number in range(len(batches))) == len(good)


def test_every_odd_thing_is_said_and_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    good = good_folder(tmp_path / "good", draw)
    subsets, expected = [subset(tmp_path / "good")], []
    for number, (kind, plant) in enumerate(ODD.items()):
        folder = tmp_path / f"odd {number}"
        folder.mkdir()
        save(folder / "fine.png", draw)
        caption(folder / "fine.png")
        pattern = plant(folder, draw)
        subsets.append(subset(folder))
        expected.append((kind, pattern))
    for one, pattern in nothing_there(tmp_path):
        subsets.append(one)
        expected.append((str(one.image_dir), pattern))
    assert len(BROKEN) + len(expected) > 25
    (result,) = scan_all([settings_of(*subsets)], check_pixels=True)
    for kind, pattern in expected:
        assert sum(bool(re.search(pattern, note)) for note in result.notes) == 1, (kind, result.notes)
    told = [note for note in result.notes if not any(re.search(pattern, note) for _, pattern in expected)]
    assert told == [], "nothing is wrong there"
    assert not [note for note in result.notes if any(path in note for path in good) or "fine.png" in note]


def test_without_faults_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = good_folder(tmp_path / "good", random.Random(SEED))
    (result,) = scan_all([settings_of(subset(tmp_path / "good"))], check_pixels=True)
    assert (result.notes, result.broken, len(result.items)) == ([], [], len(good))
    build_group([settings_of(subset(tmp_path / "good"))], [result], tokenize=None, seed=1)
    assert [record.getMessage() for record in caplog.records if "pictures read" not in record.getMessage()] == []


def test_pictures_smaller_than_a_step_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "d").mkdir()
    for name, size in (("large.png", (64, 64)), ("thin.png", (64, 5))):
        save(tmp_path / "d" / name, random.Random(1), size)
        caption(tmp_path / "d" / name)
    settings = replace(settings_of(subset(tmp_path / "d")), bucket_no_upscale=True)
    group = build_group([settings], scan_all([settings]), tokenize=None, seed=1)
    assert [Path(item.path).name for item in group.datasets[0].items] == ["large.png"]
    assert sum("thin.png (64x5)" in record.getMessage() for record in caplog.records) == 1


def test_regularisation_pictures_that_are_too_many(tmp_path: Path) -> None:
    good_folder(tmp_path / "good", random.Random(1))
    (tmp_path / "few").mkdir()
    save(tmp_path / "few" / "a.png", random.Random(1))
    caption(tmp_path / "few" / "a.png")
    (result,) = scan_all([settings_of(subset(tmp_path / "few"), subset(tmp_path / "good", is_reg=True))])
    assert [note for note in result.notes if "40 regularisation pictures for 1 training pictures" in note]


def test_metadata_that_name_what_is_not_there(tmp_path: Path) -> None:
    save(tmp_path / "a.png", random.Random(1))
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "meta.json").write_text('{"a": {"caption": "x"}, "b": {}, "gone": {}}', encoding="utf-8")
    one = SubsetSettings(kind="finetuning", metadata_file=str(tmp_path / "meta.json"), image_dir=str(tmp_path))
    settings = replace(settings_of(one), kind="finetuning")
    with pytest.raises(UserError) as error:
        scan_all([settings], check_pixels=True)
    assert len(error.value.details) == 2
    assert any(line.startswith("gone (named in ") for line in error.value.details)
    assert any("b.png (" in line for line in error.value.details)
