"""Texts of the command line and of config files that mean more than one plain value."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from library.messages import UserError


def int_or_ratio(text: str) -> int | float:
    """`100` is a number of steps, `0.1` and `10%` are shares of the run.

    Raises:
        ValueError: neither; whole numbers below 0, shares outside 0 to 1, and `1.0`, whose meaning is unclear.
    """
    text = text.strip()
    if text.endswith("%"):
        share = float(text[:-1]) / 100
        if not 0 <= share <= 1:
            raise ValueError(f"{text} is not between 0% and 100%")
        return share
    try:
        steps = int(text)
    except ValueError:
        share = float(text)
        if not 0 <= share < 1:
            raise ValueError(f"{text} is neither a whole number nor a share below 1") from None
        return share
    if steps < 0:
        raise ValueError(f"{text} is negative")
    return steps


def resolve_ratio(value: int | float, total: int) -> int:
    """Number of steps that an `int_or_ratio` value means in a run of `total` steps."""
    return value if isinstance(value, int) else int(value * total)


def key_values(texts: Iterable[str] | None, flag: str) -> dict[str, Any]:
    """`KEY=VALUE ...` with Python literals -> dictionary, in the order given.

    Args:
        flag: the option they come from, for messages.

    Raises:
        UserError: no `=`, or a value that is no literal.
    """
    result: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{flag} {text!r} has no value", "write it as KEY=VALUE")
        result[key.strip()] = _literal(key, value.strip(), flag)
    return result


def _literal(key: str, value: str, flag: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise UserError(
            f"{flag} {key}: {value!r} is not a Python literal", f"put texts in quotes: {key}=\"'{value}'\""
        ) from None
