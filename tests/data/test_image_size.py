"""Header-only picture sizes equal Pillow's."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data import image_size as module
from library.data.image_size import image_size

KINDS = {
    "png": ("PNG", ("1", "L", "P", "RGB", "RGBA"), {}),
    "jpeg": ("JPEG", ("L", "RGB", "CMYK"), {}),
    "progressive": ("JPEG", ("RGB",), {"progressive": True}),
    "webp": ("WEBP", ("RGB", "RGBA"), {}),
    "lossless": ("WEBP", ("RGB", "RGBA"), {"lossless": True}),
    "bmp": ("BMP", ("1", "L", "RGB", "RGBA"), {}),
    "gif": ("GIF", ("L", "P"), {}),
    "tiff": ("TIFF", ("L", "RGB"), {}),
}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), width=st.integers(1, 400), height=st.integers(1, 400))
def test_size_is_that_of_pillow(data: st.DataObject, width: int, height: int, tmp_path: Path) -> None:
    kind, modes, options = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    options = dict(options)
    if kind in ("JPEG", "WEBP", "PNG"):
        exif = Image.Exif()
        exif[0x0112] = data.draw(st.integers(1, 8))  # orientation, not applied
        exif[0x010E] = "x" * data.draw(st.sampled_from([0, 10, 9000]))  # pushes the frame header far back
        options["exif"] = exif.tobytes()
    path = tmp_path / "picture.png"  # the ending says nothing about the contents
    Image.new(data.draw(st.sampled_from(modes)), (width, height)).save(path, kind, **options)
    with Image.open(path) as image:
        assert image_size(path) == image.size == (width, height)


def test_common_formats_need_no_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise AssertionError(f"Pillow was asked about {path}")

    for name, (kind, modes, options) in KINDS.items():
        for mode in modes:
            Image.new(mode, (37, 21)).save(tmp_path / f"{name}.{mode}", kind, **options)
    monkeypatch.setattr(module, "_from_pillow", refuse)
    for path in sorted(tmp_path.iterdir()):
        if not path.name.startswith("tiff"):
            assert image_size(path) == (37, 21), path


def test_bottom_up_and_old_bitmaps(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (5, 3)).save(stream, "BMP")
    data = bytearray(stream.getvalue())
    data[22:26] = (-3).to_bytes(4, "little", signed=True)
    (tmp_path / "a.bmp").write_bytes(data)
    assert image_size(tmp_path / "a.bmp") == Image.open(tmp_path / "a.bmp").size == (5, 3)
    old = b"BM" + bytes(8) + (26).to_bytes(4, "little") + (12).to_bytes(4, "little")
    old += (5).to_bytes(2, "little") + (3).to_bytes(2, "little") + b"\x01\x00\x18\x00" + bytes(48)
    (tmp_path / "b.bmp").write_bytes(old)
    assert image_size(tmp_path / "b.bmp") == Image.open(tmp_path / "b.bmp").size == (5, 3)


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(40)])
def test_what_is_no_picture_is_an_os_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(OSError):
        image_size(tmp_path / "a.png")


def test_a_picture_too_large_for_pillow_is_refused_at_once(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(OSError, match="exceeds limit"):
        image_size(tmp_path / "a.png")
