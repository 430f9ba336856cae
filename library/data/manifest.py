"""The manifest of what is trained on: one line a picture, and a hash that names the whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable

from library.data.records import Item


def manifest_hash(items: Iterable[Item]) -> str:
    """Identity of a set of pictures with captions: SHA-256 over one line a picture, in hexadecimal.

    It is the same wherever the folders lie and in whatever order they are read; it changes with a picture's name,
    its folder's name, the number of bytes of its file, its size, caption, repeats, training size or kind.

    Args:
        items: the pictures of all data sets, with buckets.
    """
    digest = hashlib.sha256()
    for line in sorted(_line(item) for item in items):
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _line(item: Item) -> str:
    folder, name = os.path.split(item.path)
    try:
        length = os.stat(item.path).st_size
    except OSError:  # a picture that is there as a cache file only
        length = -1
    values = [os.path.basename(os.path.normpath(folder)), name, length, item.size, item.caption, item.repeats]
    return json.dumps([*values, item.bucket, item.is_reg], ensure_ascii=False) + "\n"
