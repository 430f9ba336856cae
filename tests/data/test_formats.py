"""Every format and mode of picture through the real data set: scan, bucket, batch; odd names, links, marks in texts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from library.data.config import resolve_datasets
from library.data.config_schema import Support
from library.data.images import to_tensor
from library.data.listing import picture_suffixes
from library.data.loader import make_loader
from library.data.sources import scan
from library.options.dataset import DatasetConfig

SIDE = 128
NOISE = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
RGB = Image.fromarray(NOISE[..., :3])
RGBA = Image.fromarray(NOISE, "RGBA")


def palette(*, clear: bool = False) -> Image.Image:
    picture = RGB.quantize(16)
    if clear:
        picture.info["transparency"] = 3
    return picture


def grey_alpha() -> Image.Image:
    return RGBA.convert("LA")


def deep() -> Image.Image:
    return Image.fromarray(NOISE[..., 0].astype(np.uint16) * 256 + NOISE[..., 1])


# name -> (ending, picture, options of Pillow's save)
FORMATS: dict[str, tuple[str, Callable[[], Image.Image], dict]] = {
    "png": (".png", lambda: RGB, {}),
    "png, alpha": (".png", lambda: RGBA, {}),
    "png, palette": (".png", palette, {}),
    "png, palette with a clear colour": (".png", lambda: palette(clear=True), {}),
    "png, grey": (".png", lambda: RGB.convert("L"), {}),
    "png, grey and alpha": (".png", grey_alpha, {}),
    "png, black and white": (".png", lambda: RGB.convert("1"), {}),
    "png, 16-bit grey": (".png", deep, {}),
    "jpg": (".jpg", lambda: RGB, {}),
    "jpeg, progressive": (".jpeg", lambda: RGB, {"progressive": True}),
    "jpg, grey": (".jpg", lambda: RGB.convert("L"), {}),
    "jpg, CMYK": (".jpg", lambda: RGB.convert("CMYK"), {}),
    "webp": (".webp", lambda: RGB, {}),
    "webp, lossless alpha": (".webp", lambda: RGBA, {"lossless": True}),
    "bmp": (".bmp", lambda: RGB, {}),
    "bmp, palette": (".bmp", palette, {}),
    "bmp, black and white": (".bmp", lambda: RGB.convert("1"), {}),
}
if features.check("avif"):
    FORMATS["avif"] = (".avif", lambda: RGB, {})
    FORMATS["avif, alpha"] = (".avif", lambda: RGBA, {})
if ".jxl" in picture_suffixes():
    FORMATS["jxl"] = (".jxl", lambda: RGB, {})


def seen(path: Path) -> np.ndarray:
    """What the picture's file holds, as 8-bit RGB."""
    with Image.open(path) as file:
        if file.mode.startswith("I"):
            return np.repeat((np.asarray(file) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(file.convert("RGB"))


def batches(group) -> list:
    return list(make_loader(group, group.plan(3, 1)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FORMATS)
def test_format(tmp_path: Path, make_group, name: str) -> None:
    suffix, picture, options = FORMATS[name]
    path = tmp_path / f"a{suffix}"
    picture().save(path, **options)
    for written in (path, path.with_suffix(suffix.upper())):
        path.rename(written)
        path = written
        group = make_group(tmp_path, num_repeats=1, sizes=(SIDE,))
        (batch,) = batches(group)
        assert batch["image_keys"] == [str(path)]
        assert batch["images"].shape == (1, 3, SIDE, SIDE)
        assert torch.equal(batch["images"][0], to_tensor(seen(path)))
        assert batch["original_sizes_hw"].tolist() == [[SIDE, SIDE]]


@pytest.mark.parametrize("name", [name for name in FORMATS if "alpha" in name or "clear" in name or name == "jpg"])
def test_alpha_becomes_a_mask(tmp_path: Path, make_group, name: str) -> None:
    suffix, picture, options = FORMATS[name]
    picture().save(tmp_path / f"a{suffix}", **options)
    (batch,) = batches(make_group(tmp_path, num_repeats=1, sizes=(SIDE,), alpha_mask=True))
    with Image.open(tmp_path / f"a{suffix}") as file:
        alpha = np.asarray(file.convert("RGBA").getchannel("A"))
    assert torch.equal(batch["alpha_masks"][0], torch.from_numpy(alpha.copy()).float() / 255)
    assert bool((batch["alpha_masks"] == 1).all()) == (name == "jpg")


def test_sixteen_bit_colour(tmp_path: Path, make_group) -> None:
    """16-bit RGB comes from Pillow as its upper 8 bits, like 16-bit grey here."""
    import zlib

    width = height = SIDE
    rows = b"".join(b"\0" + NOISE[y, :, :3].astype(">u2").__mul__(256).astype(">u2").tobytes() for y in range(height))
    chunks = [(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x10\x02\0\0\0")]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    (batch,) = batches(make_group(tmp_path, num_repeats=1, sizes=(SIDE,)))
    assert torch.equal(batch["images"][0], to_tensor(NOISE[..., :3]))


NAMES = [
    "日本語の写真.png",
    "e\u0301 decomposed.png",
    "ünïcödé.PNG",
    "with space, comma; semicolon.png",
    "[glob] *?.png" if os.name == "posix" else "[glob].png",
    "a.b.c.png",
    "-dash.png",
    "x" * 200 + ".png",
    "😀.Png",
]


def test_names(tmp_path: Path, make_group) -> None:
    for number, name in enumerate(NAMES):
        RGB.save(tmp_path / name, "PNG")
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {number}", encoding="utf-8")
    group = make_group(tmp_path, num_repeats=1, sizes=(SIDE,))
    captions = {
        Path(key).name: text
        for batch in batches(group)
        for key, text in zip(batch["image_keys"], batch["captions"], strict=True)
    }
    assert captions == {name: f"caption {number}" for number, name in enumerate(NAMES)}


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links(tmp_path: Path, make_group) -> None:
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir(), linked.mkdir()
    RGB.save(real / "a.png")
    (real / "a.txt").write_text("a text", encoding="utf-8")
    (linked / "b.png").symlink_to(real / "a.png")
    (linked / "b.txt").symlink_to(real / "a.txt")
    (tmp_path / "folder").symlink_to(linked, target_is_directory=True)
    for folder in (linked, tmp_path / "folder"):
        (batch,) = batches(make_group(folder, num_repeats=1, sizes=(SIDE,)))
        assert (batch["image_keys"], batch["captions"]) == ([str(folder / "b.png")], ["a text"])
        assert torch.equal(batch["images"][0], to_tensor(NOISE[..., :3]))


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_with_and_without_mark(tmp_path: Path, make_group, encoding: str, line_end: str) -> None:
    RGB.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(f"ein Kätzchen, 猫{line_end}second line{line_end}".encode(encoding))
    (batch,) = batches(make_group(tmp_path, num_repeats=1, sizes=(SIDE,)))
    assert batch["captions"] == ["ein Kätzchen, 猫"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".toml", ".json", ".TOML"])
def test_data_set_files_with_and_without_mark(tmp_path: Path, encoding: str, suffix: str) -> None:
    folder = (tmp_path / "bilder 猫").as_posix()
    table = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": folder}]}]}
    text = json.dumps(table, ensure_ascii=False)
    if suffix.lower() == ".toml":
        text = f'[[datasets]]\r\nresolution = 64\r\n[[datasets.subsets]]\r\nimage_dir = "{folder}"\r\n'
    path = tmp_path / f"data{suffix}"
    path.write_bytes(text.encode(encoding))
    (settings,) = resolve_datasets(DatasetConfig(dataset_config=path), support=Support())
    assert settings.subsets[0].image_dir == folder


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_metadata_files_with_and_without_mark(tmp_path: Path, encoding: str, suffix: str) -> None:
    RGB.save(tmp_path / "猫.png")
    entry = {"caption": "ein Kätzchen"}
    content = {"猫": entry} if suffix == ".json" else {"image_path": "猫", **entry}
    (tmp_path / f"meta{suffix}").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    config = DatasetConfig(
        train_data_dir=str(tmp_path), in_json=str(tmp_path / f"meta{suffix}"), resolution="128", enable_bucket=True
    )
    (settings,) = resolve_datasets(config, support=Support(finetuning=True))
    (item,) = scan(settings).items
    assert (item.caption, item.path) == ("ein Kätzchen", str(tmp_path / "猫.png"))
