"""EXIF orientation of picture files, read from their first bytes: how the stored pixels must be turned to be seen.

1: as stored; 2: mirrored; 3: upside down; 4: mirrored upside down; 5: transposed; 6: a quarter turn clockwise;
7: transposed over the other diagonal; 8: a quarter turn anticlockwise. JPEG, PNG (before the pixels), WebP and AVIF
can say it; JPEG XL and TIFF are turned by whoever decodes them.
"""

from __future__ import annotations

import os
from struct import Struct

import numpy as np

AS_STORED = 1
# Orientations in which width and height change places.
SIDEWAYS = frozenset({5, 6, 7, 8})
_TAG = 0x0112
# TIFF type of a whole number -> its bytes.
_WIDTHS = {1: 1, 3: 2, 4: 4}
EXIF = b"Exif\0\0"
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_HEAD = 448
_MOST_TAGS = 512
_PNG_CHUNK = Struct(">I4s").unpack
_WEBP_CHUNK = Struct("<4sI").unpack


class Bytes:
    """Any part of an open file; some bytes are at hand.

    Attributes:
        head: these bytes.
        handle: the file, as `os.open` gives it.
        base: where `head` starts in the file.
    """

    def __init__(self, head: bytes, handle: int, base: int = 0) -> None:
        self.head = head
        self.handle = handle
        self.base = base

    def at(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on, fewer at the end of the file."""
        offset = start - self.base
        if offset >= 0 and offset + count <= len(self.head):
            return self.head[offset : offset + count]
        return read_at(self.handle, count, start)


def read_at(handle: int, count: int, start: int) -> bytes:
    """`count` bytes of an open file from `start` on, fewer at its end."""
    if hasattr(os, "pread"):
        return os.pread(handle, count, start)
    os.lseek(handle, start, os.SEEK_SET)
    return os.read(handle, count)


def orientation_of(path: str | os.PathLike[str]) -> int:
    """The EXIF orientation of a picture file, 1 to 8; 1 where it says none.

    Raises:
        OSError: the file cannot be opened.
    """
    handle = os.open(path, _FLAGS)
    try:
        return orientation_in(Bytes(os.read(handle, _HEAD), handle), path)
    finally:
        os.close(handle)


def orientation_in(data: Bytes, path: str | os.PathLike[str]) -> int:
    """The same for a file that is open; `path` is asked where only Pillow knows the format."""
    head = data.head
    if head[:3] == b"\xff\xd8\xff":
        return _in_jpeg(data)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return _in_png(data)
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        return _in_webp(data) if head[20] & 0x08 else AS_STORED
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1"):
        return _from_pillow(path)
    return AS_STORED


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) of the turned picture."""
    return (size[1], size[0]) if orientation in SIDEWAYS else size


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels (height, width, channels) as they should be seen; contiguous."""
    if orientation == AS_STORED:
        return pixels
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _in_jpeg(data: Bytes) -> int:
    """Walk over the segments to the first one with EXIF data, at most to the pixels."""
    offset = 2
    while True:
        start = data.at(offset, 10)
        if len(start) < 4 or start[0] != 0xFF:
            return AS_STORED
        marker = start[1]
        if marker == 0xFF:  # fill byte
            offset += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            offset += 2
        elif marker in (0xD9, 0xDA):
            return AS_STORED
        elif marker == 0xE1 and start[4:10] == EXIF:
            return orientation_in_tiff(data, offset + 10)
        else:
            offset += 2 + max(2, start[2] << 8 | start[3])


def _in_png(data: Bytes) -> int:
    offset = 8
    while len(start := data.at(offset, 8)) == 8:
        length, kind = _PNG_CHUNK(start)
        if kind == b"eXIf":
            return orientation_in_tiff(data, offset + 8)
        if kind in (b"IDAT", b"IEND"):
            break
        offset += 12 + length
    return AS_STORED


def _in_webp(data: Bytes) -> int:
    offset = 12
    while len(start := data.at(offset, 8)) == 8:
        kind, length = _WEBP_CHUNK(start)
        if kind == b"EXIF":
            prefix = len(EXIF) if data.at(offset + 8, len(EXIF)) == EXIF else 0
            return orientation_in_tiff(data, offset + 8 + prefix)
        offset += 8 + length + length % 2
    return AS_STORED


def orientation_in_tiff(data: Bytes, start: int) -> int:
    """The orientation tag of the first directory of EXIF data that begin at `start`."""
    header = data.at(start, 8)
    if header[:4] == b"II*\0":
        order = "little"
    elif header[:4] == b"MM\0*":
        order = "big"
    else:
        return AS_STORED

    def number(text: bytes) -> int:
        return int.from_bytes(text, order)  # type: ignore[arg-type]

    directory = start + number(header[4:8])
    count = min(number(data.at(directory, 2)), _MOST_TAGS)
    entries = data.at(directory + 2, 12 * count)
    for at in range(0, len(entries) - 11, 12):
        if number(entries[at : at + 2]) == _TAG:
            width = _WIDTHS.get(number(entries[at + 2 : at + 4]), 0)
            value = number(entries[at + 8 : at + 8 + width])
            return value if 1 <= value <= 8 else AS_STORED
    return AS_STORED


def _from_pillow(path: str | os.PathLike[str]) -> int:
    from PIL import Image

    try:
        with Image.open(path) as image:
            value = image.getexif().get(_TAG, AS_STORED)
    except Exception:  # what is wrong with the file is said by whoever reads its pixels
        return AS_STORED
    return value if value in range(1, 9) else AS_STORED
