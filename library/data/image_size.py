"""Sizes of picture files from their first bytes, without opening them in Pillow.

PNG, JPEG, WebP, BMP and GIF are read here; everything else, and every header that is not plain, goes to Pillow, so
the answer is Pillow's. EXIF orientation is not applied.
"""

from __future__ import annotations

import os
from collections.abc import Callable

HEAD = 4096
# Above this Pillow refuses a picture as a decompression bomb (twice its warning limit).
LARGEST = 2 * (1024 * 1024 * 1024 // 4 // 3)
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})

Size = tuple[int, int]
ReadAt = Callable[[int, int], bytes]


def image_size(path: str | os.PathLike[str]) -> Size:
    """(width, height) of a picture file.

    Raises:
        OSError: the file cannot be opened, or is no picture that Pillow knows.
    """
    size = _from_header(path)
    if size is not None and 0 < size[0] * size[1] <= LARGEST and min(size) > 0:
        return size
    return _from_pillow(path)


def _from_pillow(path: str | os.PathLike[str]) -> Size:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        raise
    except Exception as error:  # plug-ins raise many kinds, also for pictures that are too large
        raise OSError(str(error) or type(error).__name__) from error


def _from_header(path: str | os.PathLike[str]) -> Size | None:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        head = os.read(handle, HEAD)

        def read_at(offset: int, count: int) -> bytes:
            if offset + count <= len(head):
                return head[offset : offset + count]
            os.lseek(handle, offset, os.SEEK_SET)
            return os.read(handle, count)

        return _parse(head, read_at)
    finally:
        os.close(handle)


def _parse(head: bytes, read_at: ReadAt) -> Size | None:
    if len(head) < 26:
        return None
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg(read_at)
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        return _big(head[16:20]), _big(head[20:24])
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(head)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _little(head[6:8]), _little(head[8:10])
    if head.startswith(b"BM"):
        return _bmp(head)
    return None


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _jpeg(read_at: ReadAt) -> Size | None:
    """Walk over the segments to the frame header."""
    offset = 2
    while True:
        head = read_at(offset, 9)
        if len(head) < 9 or head[0] != 0xFF:
            return None
        marker = head[1]
        if marker == 0xFF:  # fill byte
            offset += 1
        elif marker in _BARE_MARKERS:
            offset += 2
        elif marker in _FRAME_MARKERS:
            return _big(head[7:9]), _big(head[5:7])
        elif marker in (0xD9, 0xDA):  # the end, or pixels before any frame header
            return None
        else:
            offset += 2 + max(2, _big(head[2:4]))


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
