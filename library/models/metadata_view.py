"""Metadata of a safetensors file for a reader: nested JSON unfolded, long lists cut; or as it stands, for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.messages import UserError, write
from library.models.checkpoint import SafetensorsCheckpoint, open_checkpoint
from library.options.model_tools import ModelMetadataConfig

NONE_FOUND = "No metadata found"
# Entries of a nested list or table that are shown.
SHOWN = 20


def show_metadata(options: ModelMetadataConfig) -> None:
    """`show_metadata.py`.

    Raises:
        UserError: the file is missing, broken, or no safetensors file.
    """
    metadata = metadata_of(options.model)
    if not metadata:
        write(NONE_FOUND)
    else:
        write(as_json(metadata) if options.json else readable(metadata))


def metadata_of(path: str | Path) -> dict[str, str]:
    """The texts in a safetensors header.

    Raises:
        UserError: the file is missing, broken, or no safetensors file.
    """
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise UserError(f"{path} is no safetensors file, so it has no metadata", "give a .safetensors file")
    return checkpoint.metadata


def as_json(metadata: Mapping[str, str]) -> str:
    """One object: keys sorted, every value a text, ASCII only."""
    return json.dumps(metadata, indent=4, sort_keys=True)


def readable(metadata: Mapping[str, str]) -> str:
    """One line a key, keys sorted; JSON inside a text is unfolded below its key."""
    return "\n".join(line for key in sorted(metadata) for line in _lines(key, _parsed(metadata[key]), 0))


def _parsed(text: str) -> Any:
    """What a text holds: a table or list where it is JSON of one, else the text."""
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lines(key: str, value: Any, depth: int) -> Iterator[str]:
    indent = "    " * depth
    if isinstance(value, dict) and value:
        yield f"{indent}{key}:"
        for name, inner in list(value.items())[:SHOWN]:
            yield from _lines(str(name), inner, depth + 1)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        yield f"{indent}{key}:"
        for place, item in enumerate(value[:SHOWN]):
            yield from _lines(f"[{place}]", item, depth + 1)
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else "{}" if value == {} else str(value)
        first, *rest = text.split("\n")
        yield f"{indent}{key}: {first}".rstrip()
        yield from (f"{indent}    {line}" for line in rest)
        return
    if len(value) > SHOWN:
        yield f"{indent}    ... and {len(value) - SHOWN} more (--json shows all)"
