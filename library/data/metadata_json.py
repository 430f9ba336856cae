"""Metadata files as the preparation tools pass them on: read with all members of every entry, written as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from library.data.plain_text import read_text
from library.messages import UserError
from library.runtime.files import atomic_write, no_file

Metadata = dict[str, dict[str, Any]]


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Picture -> its members, in the file's order; members that no tool knows included.

    Raises:
        UserError: missing, not UTF-8, not JSON, or no object of objects.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"metadata file {path} {no_file(path)}", "give the path of a metadata file")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}", "mend the file, or make it anew") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply", "give a metadata file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object", 'a metadata file looks like {"picture": {"caption": "..."}}')
    wrong = next((key for key, members in content.items() if not isinstance(members, dict)), None)
    if wrong is not None:
        raise UserError(f"{path}: the entry of {wrong} is no object", 'it must look like {"caption": "..."}')
    return content


def write_metadata(path: str | os.PathLike[str], metadata: Metadata) -> None:
    """Write a metadata file: indent 2, everything but ASCII escaped, no final line break, as the original does.

    Raises:
        UserError: it cannot be written; an earlier file is unchanged.
    """
    with atomic_write(path, "w") as file:
        json.dump(metadata, file, indent=2)
