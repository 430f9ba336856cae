"""Text files as people save them: UTF-8 with or without a byte order mark, or UTF-16 with one."""

from __future__ import annotations

import os

from library.data.image_size import read_bytes
from library.messages import UserError


def decode_text(data: bytes) -> str:
    """The text of a file's bytes, line ends as `\\n`.

    Raises:
        UnicodeDecodeError: neither UTF-8, nor UTF-16 with a mark.
    """
    if data[:2] not in (b"\xff\xfe", b"\xfe\xff") and (zero := data.find(b"\0")) >= 0:
        raise UnicodeDecodeError("utf-8", data, zero, zero + 1, "a zero byte, it may be UTF-16 without a mark")
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8").removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_text(path: str | os.PathLike[str]) -> str:
    """A whole text file.

    Raises:
        UserError: it cannot be read; names the file.
        FileNotFoundError: it is not there.
    """
    try:
        return decode_text(read_bytes(path))
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "check the file and its permissions") from error
