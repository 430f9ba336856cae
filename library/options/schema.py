"""JSON schema of a script's options, for front ends (`--dump_schema`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.options.declare import Option
from library.options.scripts import find_script
from library.options.values import int_or_ratio

_TYPES: dict[Any, Any] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    Path: "string",
    int_or_ratio: ["integer", "number", "string"],
}


def json_type(option: Option) -> dict[str, Any]:
    """The schema of one option's value."""
    one: dict[str, Any] = {"type": _TYPES[option.value_type]}
    if option.choices:
        # some original options have a default outside their choices
        one["enum"] = [c for c in dict.fromkeys([*option.choices, option.default]) if c is not None]
    return {"type": "array", "items": one} if option.nargs else one


def schema(script: str) -> dict[str, Any]:
    """All options of a script; `x-concern` groups them, `x-flag` is the flag."""
    entry = find_script(script)
    properties = {}
    for concern, options in entry.groups():
        for option in options:
            properties[option.dest] = {
                **json_type(option),
                "description": option.help,
                "default": option.default,
                "x-flag": option.flag,
                "x-concern": concern,
            }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": script,
        "description": entry.summary,
        "type": "object",
        "properties": properties,
        "required": list(entry.required),
    }
