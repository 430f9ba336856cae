"""Which pictures the caption, tag and bucket tools work on."""

from __future__ import annotations

import os
from pathlib import Path

from library.data.listing import picture_suffixes
from library.messages import UserError
from library.runtime.files import no_folder


def find_pictures(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[str]:
    """Paths of the pictures in a folder: the folder as given plus the rest, sorted by their parts.

    Endings count in any case of letters; names that start with a dot are found too, unlike in data sets. Linked
    folders are not entered.

    Args:
        folder: where to look.
        recursive: also in all folders below.

    Raises:
        UserError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} {no_folder(root)}", "give the folder that holds the pictures")
    suffixes = picture_suffixes()
    found: list[Path] = []
    for place, folders, names in os.walk(root):
        found += [Path(place, name) for name in names if name.lower().endswith(suffixes)]
        if not recursive:
            folders.clear()
    return [str(path) for path in sorted(found, key=lambda path: path.parts)]
