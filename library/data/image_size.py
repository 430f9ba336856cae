"""Sizes of picture files from their first bytes, without opening them in Pillow.

PNG, JPEG, WebP, BMP and GIF are read here; everything else, and every header that is not plain, goes to Pillow, so
the answer is Pillow's. EXIF orientation is told beside the size where it is asked for, and applied by none of these.
"""

from __future__ import annotations

import os
from struct import Struct

from library.data.buckets import Size
from library.data.orientation import AS_STORED, EXIF, Bytes, orientation_in, orientation_in_tiff, read_at

# Holds the segments of a plain JPEG file up to its pixels, and the chunks of most others that matter here.
HEAD = 1024
REST = 65536
# Above this Pillow refuses a picture as a decompression bomb (twice its warning limit).
LARGEST = 2 * (1024 * 1024 * 1024 // 4 // 3)
# Of `os.open` for reading bytes.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
_BIG_PAIR = Struct(">II").unpack_from
_HEIGHT_WIDTH = Struct(">HH").unpack_from


def image_size(path: str | os.PathLike[str]) -> Size:
    """(width, height) of a picture file.

    Raises:
        OSError: the file cannot be opened, or is no picture that Pillow knows.
    """
    # Plain system calls: `open` alone would cost more than all of this.
    handle = os.open(path, OPEN_FLAGS)
    try:
        size = _parse(os.read(handle, HEAD), handle)
    finally:
        os.close(handle)
    if size is not None and 0 < size[0] * size[1] <= LARGEST and size[0] > 0:
        return size
    return _from_pillow(path)


def size_and_orientation(path: str | os.PathLike[str]) -> tuple[Size, int]:
    """(width, height) as stored, and the EXIF orientation (1: as stored; see `library.data.orientation`).

    Raises:
        OSError: as `image_size`.
    """
    handle = os.open(path, OPEN_FLAGS)
    try:
        return facts_of_open_file(handle, path)
    finally:
        os.close(handle)


def facts_of_open_file(handle: int, path: str | os.PathLike[str]) -> tuple[Size, int]:
    """The same of a file that `os.open` opened; `path` is for Pillow, where it is asked."""
    head = os.read(handle, HEAD)
    if head[:3] == b"\xff\xd8\xff" and len(head) >= 26:
        size, orientation = _jpeg(head, handle, with_orientation=True)
    else:
        size = _parse(head, handle)
        orientation = orientation_in(Bytes(head, handle), path)
    if size is None or not 0 < size[0] * size[1] <= LARGEST or size[0] <= 0:
        size = _from_pillow(path)
    return size, orientation


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A whole small file, at half the cost of `open`."""
    handle = os.open(path, OPEN_FLAGS)
    try:
        data = os.read(handle, HEAD)
        if len(data) < HEAD:
            return data
        while more := os.read(handle, REST):
            data += more
        return data
    finally:
        os.close(handle)


def _from_pillow(path: str | os.PathLike[str]) -> Size:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        raise
    except Exception as error:  # plug-ins raise many kinds, also for pictures that are too large
        raise OSError(str(error) or type(error).__name__) from error


def _parse(head: bytes, handle: int) -> Size | None:
    if len(head) < 26:
        return None
    start = head[:4]
    if start[:3] == b"\xff\xd8\xff":
        return _jpeg(head, handle)[0]
    if start == b"\x89PNG" and head[4:8] == b"\r\n\x1a\n" and head[12:16] == b"IHDR":
        return _BIG_PAIR(head, 16)
    if start == b"RIFF" and head[8:12] == b"WEBP":
        return _webp(head)
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _little(head[6:8]), _little(head[8:10])
    if start[:2] == b"BM":
        return _bmp(head)
    return None


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _jpeg(head: bytes, handle: int, *, with_orientation: bool = False) -> tuple[Size | None, int]:
    """Walk over the segments to the frame header, or to the pixels where the orientation has not come before.

    Args:
        head: first bytes of the file.
        handle: the file, for segments that lie behind them.
        with_orientation: look for EXIF data too; else the orientation is 1.
    """
    size, orientation = None, None if with_orientation else AS_STORED
    base, offset = 0, 2  # `head` starts at `base` in the file
    while size is None or orientation is None:
        if offset + 10 > len(head):
            base, offset = base + offset, 0
            head = read_at(handle, HEAD, base)
        if len(head) < 9 or head[offset] != 0xFF:
            break
        marker = head[offset + 1]
        if marker in _FRAME_MARKERS:
            if size is None:
                height, width = _HEIGHT_WIDTH(head, offset + 5)
                size = width, height
            offset += 2 + max(2, head[offset + 2] << 8 | head[offset + 3])
        elif marker == 0xFF:  # fill byte
            offset += 1
        elif marker in _BARE_MARKERS:
            offset += 2
        elif marker in (0xD9, 0xDA):  # the end, or pixels before any frame header
            break
        else:
            if marker == 0xE1 and orientation is None and head[offset + 4 : offset + 10] == EXIF:
                orientation = orientation_in_tiff(Bytes(head, handle, base), base + offset + 10)
            offset += 2 + max(2, head[offset + 2] << 8 | head[offset + 3])
    return size, orientation or AS_STORED


def _webp(head: bytes) -> Size | None:
    chunk = head[12:16]
    if chunk == b"VP8X" and len(head) >= 30:
        return _little(head[24:27]) + 1, _little(head[27:30]) + 1
    if chunk == b"VP8L" and head[20] == 0x2F:
        bits = _little(head[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(head) >= 30 and head[23:26] == b"\x9d\x01\x2a":
        return _little(head[26:28]) & 0x3FFF, _little(head[28:30]) & 0x3FFF
    return None


def _bmp(head: bytes) -> Size | None:
    length = _little(head[14:18])
    if length == 12:
        return _little(head[18:20]), _little(head[20:22])
    if length in (40, 52, 56, 64, 108, 124):
        width = int.from_bytes(head[18:22], "little", signed=True)
        return width, abs(int.from_bytes(head[22:26], "little", signed=True))
    return None
