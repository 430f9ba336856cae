"""Metadata files: a JSON object, or JSON Lines, that names pictures with their captions, tags and sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.metadata_json import read_metadata
from library.data.plain_text import read_text
from library.data.records import Size, SubsetSettings
from library.messages import UserError
from library.runtime.files import no_file

# Names of the picture in a line of a JSON Lines file; the first is the one that other programs write.
PATH_KEYS = ("image_path", "file_name")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a metadata file says of one picture.

    Attributes:
        key: path of the picture, or its name with or without ending.
        caption: text; tags: comma-separated.
        several: the caption's lines are captions of their own, of which one is used at a time.
        train_size: (width, height) that it is trained in, as preparation tools write it (`train_resolution`).
        image_size: (width, height) of the picture (`image_size`).
    """

    key: str
    caption: str | None = None
    tags: str | None = None
    train_size: Size | None = None
    image_size: Size | None = None
    several: bool = False


def read_entries(path: str | os.PathLike[str]) -> list[Entry]:
    """The entries of a metadata file, in its order.

    Args:
        path: a `.jsonl` file has one object a line with `image_path`; any other holds one object, picture -> object.

    Raises:
        UserError: missing, not UTF-8, not JSON, or of another form; names the place.
    """
    path = Path(path)
    if path.suffix.lower() == ".jsonl":
        return [_entry(path, key, members) for key, members in _lines(path)]
    return [_entry(path, key, members) for key, members in read_metadata(path).items()]


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise UserError(f"metadata file {path} {no_file(path)}", "check the path given as --in_json or metadata_file")
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            members = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is no valid JSON: {error}", "mend the line") from error
        name = next((members[key] for key in PATH_KEYS if key in members), None) if isinstance(members, dict) else None
        if not isinstance(name, str):
            raise UserError(f"{path} line {number} names no picture", f'give it as "{PATH_KEYS[0]}"')
        yield name, members


def _entry(path: Path, key: str, members: Mapping[str, Any]) -> Entry:
    caption = members.get("caption")
    several = False
    if isinstance(caption, list) and all(isinstance(line, str) for line in caption):
        caption, several = "\n".join(" ".join(line.split("\n")) for line in caption), len(caption) > 1
    tags = members.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = ", ".join(tags)
    for name, value in (("caption", caption), ("tags", tags)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{path}: {name} of {key} is {_kind(value)}", "it must be a text")
    sizes = [_size(path, key, name, members.get(name)) for name in ("train_resolution", "image_size")]
    return Entry(key, caption, tags, *sizes, several)


def _size(path: Path, key: str, name: str, value: Any) -> Size | None:
    if value is None:
        return None
    sides = value if isinstance(value, list) else ()
    if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
        return sides[0], sides[1]
    raise UserError(f"{path}: {name} of {key} is {json.dumps(value)}", "it must be [width, height]")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def caption_of(entry: Entry, subset: SubsetSettings) -> str:
    """The caption of an entry: its text, its tags, or both; several lines only with wildcards.

    With wildcards each line of the text is a caption of its own, and every one gets the tags. Without, line breaks are
    blanks, so that nothing of the text is lost; of a list of captions the first one is used.
    """
    separator = subset.caption_separator or ","
    if subset.enable_wildcard:
        tags = separator.join(_filled_lines(entry.tags))
        lines = _filled_lines(entry.caption)
        if not lines:
            return tags
        return "\n".join(f"{line}{separator}{tags}" if tags else line for line in lines)
    caption = entry.caption.split("\n")[0] if entry.caption and entry.several else entry.caption
    parts = [" ".join(text.split("\n")) for text in (caption, entry.tags) if text]
    return f"{separator} ".join(parts)


def _filled_lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").split("\n") if line.strip()]
