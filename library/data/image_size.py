"""Sizes of picture files from their first bytes, without opening them in Pillow.

PNG, JPEG, WebP, BMP and GIF are read here; everything else, and every header that is not plain, goes to Pillow, so
the answer is Pillow's. EXIF orientation is told beside the size where it is asked for, and applied by none of these.
"""

from __future__ import annotations

import os
from struct import Struct

from library.data.orientation import Bytes, orientation_in

# Small enough for Python's own allocator, which makes a difference over thousands of files.
HEAD = 448
REST = 65536
# Above this Pillow refuses a picture as a decompression bomb (twice its warning limit).
LARGEST = 2 * (1024 * 1024 * 1024 // 4 // 3)
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
_BIG_PAIR = Struct(">II").unpack_from
_HEIGHT_WIDTH = Struct(">HH").unpack_from

Size = tuple[int, int]


def image_size(path: str | os.PathLike[str]) -> Size:
    """(width, height) of a picture file.

    Raises:
        OSError: the file cannot be opened, or is no picture that Pillow knows.
    """
    # Plain system calls: `open` alone would cost more than all of this.
    handle = os.open(path, _FLAGS)
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
    handle = os.open(path, _FLAGS)
    try:
        head = os.read(handle, HEAD)
        size = _parse(head, handle)
        orientation = orientation_in(Bytes(head, handle), path)
    finally:
        os.close(handle)
    if size is None or not 0 < size[0] * size[1] <= LARGEST or size[0] <= 0:
        size = _from_pillow(path)
    return size, orientation


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A whole small file, at half the cost of `open`."""
    handle = os.open(path, _FLAGS)
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
        return _jpeg(head, handle)
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


def _jpeg(head: bytes, handle: int) -> Size | None:
    """Walk over the segments to the frame header.

    Args:
        head: first bytes of the file.
        handle: the file, for segments that lie behind them.
    """
    base, offset = 0, 2  # `head` starts at `base` in the file
    while True:
        if offset + 9 > len(head):
            base, offset = base + offset, 0
            os.lseek(handle, base, os.SEEK_SET)
            head = os.read(handle, HEAD)
        if len(head) < 9 or head[offset] != 0xFF:
            return None
        marker = head[offset + 1]
        if marker in _FRAME_MARKERS:
            height, width = _HEIGHT_WIDTH(head, offset + 5)
            return width, height
        if marker == 0xFF:  # fill byte
            offset += 1
        elif marker in _BARE_MARKERS:
            offset += 2
        elif marker in (0xD9, 0xDA):  # the end, or pixels before any frame header
            return None
        else:
            offset += 2 + max(2, head[offset + 2] << 8 | head[offset + 3])


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
